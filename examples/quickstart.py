"""The front page's quickstart: compile a model in FP8, and see what was rewritten. Runs on a laptop's CPU."""

import torch

import fp8fx

torch.manual_seed(0)
model = torch.nn.TransformerEncoderLayer(d_model=256, nhead=4, dim_feedforward=1024, batch_first=True).eval()
x = torch.randn(8, 64, 256)
compiled = torch.compile(model, backend="fp8")  # all that changes

with torch.no_grad():
    print(fp8fx.explain(model, x))
    print(f"relative error: {(compiled(x) - model(x)).norm() / model(x).norm():.1%}")
