"""A margin of one's own: it sees the target cosines, autograd does its derivative."""

import torch

import fastmargin as fm


class LearnableCosFace(fm.SoftmaxMargin):
    """CosFace with one learnable margin per class, kept large by a penalty (AdaptiveFace)."""

    def __init__(self, classes, start=0.35, s=30.0, pull=1.0):
        super().__init__(s)
        self.margins = torch.nn.Parameter(torch.full((classes,), start))
        self.pull = pull

    def forward(self, cos_y, norm, labels):
        return cos_y - self.margins.clamp(0, 1)[labels.clamp_min(0)]

    def penalty(self, norm):
        return self.pull * (1 - self.margins.clamp(0, 1).mean()) * torch.ones_like(norm)


torch.manual_seed(0)
head = fm.MarginHead(16, 20, LearnableCosFace(20))
optimiser = torch.optim.Adam(head.parameters(), lr=0.01)
centres = torch.randn(20, 16)
for _ in range(200):
    labels = torch.randint(0, 20, (64,))
    spread = 0.1 + 0.05 * labels[:, None]  # later classes are harder
    loss = head(centres[labels] + spread * torch.randn(64, 16), labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
margins = head.margin.margins.detach()
easy, hard = margins[:5].mean(), margins[-5:].mean()
print(f"margin of the easy classes {easy:.2f}, of the hard ones {hard:.2f}")
