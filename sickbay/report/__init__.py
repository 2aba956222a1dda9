"""Pure functions from a chart and a checkup to text: the closing card, report.json, report.html, Markdown. No torch in here."""
