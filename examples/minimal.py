"""A training loop with a margin head, on random clusters: the shortest whole program."""

import torch

import fastmargin as fm

torch.manual_seed(0)
people, pixels, size = 500, 64, 32
faces = torch.randn(people, pixels)

backbone = torch.nn.Sequential(
    torch.nn.Linear(pixels, 128), torch.nn.ReLU(), torch.nn.Linear(128, size)
)
head = fm.MarginHead(size, people, fm.AdaFace(m=0.4, s=64.0))
optimiser = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9)

for step in range(301):
    labels = torch.randint(0, people, (256,))
    images = faces[labels] + 0.5 * torch.randn(256, pixels)
    loss = head(backbone(images), labels)  # raw embeddings; the loss comes back
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.2f}, top-1 {head.metrics['top1'].item():.2f}")

print(
    "nearest centres of the first image:", head.predict(backbone(faces[:1]), topk=3).label.tolist()
)
