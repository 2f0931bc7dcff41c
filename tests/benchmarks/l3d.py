"""A step of L3D, factored and written plainly: per-sample gradients of weights, dense subnetworks.

As a program it takes two steps of one of them and prints its peak memory as JSON; `gpt2-small` is two steps of training, with
the optimiser, of a model of that size.
"""

import json
import sys

import torch

import tl_paramdecomp as tlpd
from tests.benchmarks.peak_memory import resident
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.methods.method import TrainingStep
from tl_paramdecomp.methods.sample_gradients import GradientPass, all_gradients
from tl_paramdecomp.patching.target import frozen

SITES, ROWS, LENGTH = "blocks.*.mlp.*", 8, 8


def target():
    """Four layers of width 128, random."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config).eval()


def train_gpt2_small() -> int:
    """All 24 MLP matrices, 1,000 subnetworks of rank 1, 16 rows of 64 tokens; random weights. Gives the parameters learned."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    tokens = torch.randint(0, 50257, (16, 64), generator=torch.Generator().manual_seed(1))
    made = tlpd.decompose(model, SITES, tlpd.L3D(n_subnetworks=1000), tokens, 2, 16, progress=False)
    return sum(parameter.numel() for parameter in made.parameters())


class Step:
    """Loss and gradients on 64 samples: every position of 8 rows."""

    def __init__(self, model, rank, n_subnetworks=128):
        self.adapter = adapt(model)
        self.method = tlpd.L3D(
            n_subnetworks=n_subnetworks, rank=rank, positions="all", reference="mean", biases=False, warm_start=0.0
        )
        self.tokens = torch.randint(0, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
        self.made = tlpd.decompose(model, SITES, self.method, self.tokens, 0, progress=False).requires_grad_(True)

    def factored(self):
        self.made.zero_grad()
        generator = torch.Generator().manual_seed(0)
        return self.method.gradients(TrainingStep(self.adapter, self.made, Batch(self.tokens, None), generator)).total

    def plain(self):
        """The same loss from gradients and subnetworks that are all formed."""
        self.made.zero_grad()
        names = list(self.made.sites)
        run = GradientPass(self.adapter, names, self.tokens)
        groups = all_gradients(run, run.places("all", torch.Generator()), "mean", "kl", torch.Generator())
        G = torch.cat([torch.cat([(g[n].x.transpose(1, 2) @ g[n].g).flatten(1) for n in names], 1) for g in groups])
        E, D = (
            torch.cat([(side[n].A @ side[n].B.transpose(1, 2)).flatten(1) for n in names], 1)
            for side in (self.made.encoder, self.made.decoder)
        )
        a = G @ E.T
        kept = a.detach().abs()
        kept = kept >= kept.flatten().topk(round(0.1 * kept.numel())).values[-1]
        loss = ((G - (a * kept) @ D) ** 2).sum() / (G**2).sum()
        loss.backward()
        return loss.detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "gpt2-small":
        torch.set_num_threads(2)
        print(json.dumps({"parameters": train_gpt2_small(), "peak": resident()}))
        sys.exit()
    which, rank = sys.argv[1], int(sys.argv[2])
    model = target()
    with frozen(model):
        step = Step(model, rank)
        before = resident()
        for _ in range(2):
            getattr(step, which)()
    print(json.dumps({"peak": resident(), "grown": resident() - before}))
