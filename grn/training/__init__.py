"""LightningModules: losses, optimizers and what is logged. The networks know nothing of them."""

from grn.training.refiner import RefinerModule
from grn.training.text_refiner import TextRefinerModule
from grn.training.tokenizer import TokenizerModule

AnyModule = RefinerModule | TokenizerModule

__all__ = ["AnyModule", "RefinerModule", "TextRefinerModule", "TokenizerModule"]
