"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const tell = (value) => {
    if (value == null) return "";
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1e6 || size < 1e-4 ? value.toExponential(1) : value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };
  const MARK_ROWS = Math.min(4, data.marks.length);
  const HEIGHT = 205 + 15 * MARK_ROWS;
  const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif';

  // The findings as dashed lines with their names, and the steps without a finite value as a rug along the top.
  const drawMarks = (u, lost) => {
    const { ctx, bbox } = u, ratio = devicePixelRatio;
    ctx.save();
    ctx.fillStyle = colour("lost");
    for (const step of lost) {
      const x = u.valToPos(step, "x", true);
      if (x >= bbox.left && x <= bbox.left + bbox.width + 1) ctx.fillRect(x - ratio, bbox.top, 2 * ratio, 7 * ratio);
    }
    ctx.font = FONT.replace("11px", 11 * ratio + "px");
    ctx.textBaseline = "top";
    ctx.textAlign = "left";
    const rows = [];
    for (const [step, label, severity] of data.marks) {
      const x = u.valToPos(step, "x", true);
      if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
      ctx.strokeStyle = ctx.fillStyle = colour(severity);
      ctx.lineWidth = 1.5 * ratio;
      ctx.setLineDash([4 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      // The names stand above the plot, where they hide no data; each in the first row that has room.
      const width = ctx.measureText(label).width, gap = 8 * ratio;
      const left = Math.min(x, bbox.left + bbox.width - width);
      let row = 0;
      while ((rows[row] || []).some(([from, to]) => left < to + gap && left + width > from - gap)) row += 1;
      if (row >= MARK_ROWS) continue;
      (rows[row] = rows[row] || []).push([left, left + width]);
      ctx.fillText(label, left, bbox.top - (row + 1) * 15 * ratio);
    }
    ctx.restore();
  };

  // uPlot's own log axis rules every unit of a decade; the decades are enough, thinned where there are many.
  const powersOfTen = (u, axis, low, high) => {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    const every = Math.max(1, Math.ceil((last - first) / 6));
    return Array.from({ length: Math.floor((last - first) / every) + 1 }, (_, i) => Number("1e" + (first + i * every)));
  };

  const sync = uPlot.sync("run");
  const plots = [];
  // Away from the pointer the legend tells the last step.
  const shown = (u, series, index) => u.data[series][index ?? u.data[0].length - 1];
  const draw = () => {
    plots.splice(0).forEach((plot) => plot.destroy());
    for (const element of document.querySelectorAll("[data-chart]")) {
      const chart = data.charts[Number(element.dataset.chart)];
      const axis = { stroke: colour("muted"), font: FONT, ticks: { stroke: colour("rule"), width: 1 }, grid: { stroke: colour("rule"), width: 1 } };
      const inks = ["first", "second", "third"].map(colour);
      const options = {
        width: element.clientWidth,
        height: HEIGHT,
        padding: [8 + 15 * MARK_ROWS, null, null, null],
        cursor: { sync: { key: sync.key }, points: { size: 6 } },
        legend: { live: true },
        scales: { x: { time: false }, y: chart.log ? { distr: 3 } : {} },
        axes: [
          { ...axis, grid: { show: false }, size: 30, values: (u, ticks) => ticks.map((t) => (Number.isInteger(t) ? t.toLocaleString("en") : "")) },
          { ...axis, size: 62, ...(chart.log ? { splits: powersOfTen } : {}), values: (u, ticks) => ticks.map((t) => (t == null ? "" : tell(t))) },
        ],
        series: [
          { label: "step", value: (u, v, s, i) => shown(u, s, i).toLocaleString("en") },
          ...chart.lines.map((line, i) => ({
            label: line.label, stroke: inks[i], width: 1.5, dash: line.dashed ? [5, 4] : undefined, spanGaps: chart.lines.length > 1, pxAlign: false,
            points: { show: line.values.filter((v) => v != null).length < 40, size: 4 }, value: (u, v, s, i) => tell(shown(u, s, i)),
          })),
        ],
        hooks: { draw: [(u) => drawMarks(u, chart.lost)] },
      };
      plots.push(new uPlot(options, [chart.steps, ...chart.lines.map((line) => line.values)], element));
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("resize", () => plots.forEach((plot) => plot.setSize({ width: plot.root.parentElement.clientWidth, height: HEIGHT })));

  for (const svg of document.querySelectorAll("[data-map]")) {
    const map = data.maps[Number(svg.dataset.map)];
    const [left, top, width, height] = map.box;
    const readout = svg.closest("figure").querySelector(".readout");
    svg.addEventListener("mouseleave", () => { readout.textContent = ""; });
    svg.addEventListener("mousemove", (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const column = Math.floor(((place.x - left) / width) * map.columns.length);
      const row = Math.floor(((place.y - top) / height) * map.rows.length);
      const value = (map.values[row] || [])[column];
      if (value === undefined) { readout.textContent = ""; return; }
      const [first, last] = map.columns[column];
      const steps = first === last ? `step ${first}` : `steps ${first} to ${last}`;
      readout.textContent = `${map.rows[row]}, ${steps}: ${value === null ? "not measured" : typeof value === "number" ? tell(value) + " " + map.unit : value}`;
    });
  }
})();
