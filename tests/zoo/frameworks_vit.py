import sys
from functools import partial

import torch
import torch.nn.functional as nnf
from torch.utils.data import DataLoader, Dataset
from transformers import ViTConfig, ViTForImageClassification

torch.set_num_threads(1)


class Shapes(Dataset):
    """Grey squares, crosses and bars with noise, 1x16x16."""

    def __init__(self, n, bad=None):
        g = torch.Generator().manual_seed(n)
        self.y = torch.randint(0, 3, (n,), generator=g)
        self.x = 0.3 * torch.randn(n, 1, 16, 16, generator=g)
        for im, k in zip(self.x, self.y):
            r, c = torch.randint(2, 9, (2,), generator=g).tolist()
            if k == 0:
                im[0, r : r + 5, c : c + 5] += 1
            elif k == 1:
                im[0, r + 2, c : c + 5] += 1.5
                im[0, r : r + 5, c + 2] += 1.5
            else:
                im[0, r : r + 5, c] += 2
        if bad == "nanpixel":
            self.x[37, 0, 3, 3] = float("nan")
        if bad == "bigclass":
            self.y[5] = 3

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "labels": self.y[i]}


def run(mode="fp32", bad=None):
    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            num_channels=1,
            num_labels=3,
            hidden_dropout_prob=0.1,
        )
    )
    opt = torch.optim.NAdam(vit.parameters(), lr={"hot": 3.0}.get(bad, 2e-3), weight_decay=1e-4)
    amp = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=mode == "bf16")
    train, test = DataLoader(Shapes(320, bad), 32, shuffle=True), DataLoader(Shapes(96), 48)
    ema = {k: v.clone() for k, v in vit.state_dict().items()}
    for epoch in range(4):
        vit.train()
        for b in train:
            with amp():
                logits = vit(b["pixel_values"] if bad != "flat" else b["pixel_values"].flatten(1)).logits
                loss = nnf.cross_entropy(logits, b["labels"], label_smoothing=0.1)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            with torch.no_grad():
                for k, v in vit.state_dict().items():
                    ema[k].lerp_(v, 0.1)
        if bad != "evaldropout":
            vit.eval()
        with torch.no_grad():
            hit = sum((vit(b["pixel_values"]).logits.argmax(-1) == b["labels"]).sum().item() for b in test)
        print(epoch, round(loss.item(), 3), hit / 96)


run(*sys.argv[1:])
