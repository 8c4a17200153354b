"""The end of a run whose model FSDP2 has sharded: it is certified, cut and saved while no rank ever holds it whole.

The model becomes plain again, as it was before it was sharded, but without weights: these stay on the ranks as shards.
While the model runs, each of its layers has whole weights for as long as its own forward takes.

A rank holds at most model/N + kept/N bytes of shards, where N is the number of ranks, beside what is in no layer (the
embeddings and the head) and one layer; or, while weights are cut, beside two copies of the largest weight.

Worked example: a decoder of 70 billion weights takes 282 GB in float32, and a cut keeps half. Of 8 ranks each holds
35 GB of shards. For the certificate it gathers 8.4 GB, the embeddings and the head, and 3.4 GB, one layer, which it
drops after that layer has run. For the cut it gathers one weight, cuts it, keeps an eighth of what is left, and drops
its old shard: the 35 GB become 18 GB.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from .by_layers import LayerByLayer, blocks_of
from .calls import Forward
from .certificate import ONLY_AS_THEY_ARE, Certificate, exact_outputs, own_outputs
from .compaction import Compaction
from .cut import Cut, TrialCut
from .differences import largest_difference
from .modeling_oto import named_tensors
from .report import size
from .restore import contents, replace_tensors_, restored
from .shards import (
    Shards,
    divided,
    of_all_ranks,
    save_by_pieces_,
    whole,
    whole_in_files,
)
from .slices import Part, Slice, local, on_this_rank, rows_of, slices_of, sum_over_zigs
from .undivided import Tensors, Undivided
from .uniform import Tie, built_by_config
from .zigs import PruningPlan, ZIGPartition


def let_go_of_whole_weights(sharded: nn.Module) -> None:
    """Puts the shards in their places again, where FSDP2 has kept weights whole since the last forward."""
    if any(isinstance(module, FSDPModule) for module in sharded.modules()):
        get_model_state_dict(sharded)


def divide_(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Lets FSDP2 divide a model: its blocks, and together what is in none of them."""
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


class BeforeSharding(Undivided):
    """A model as it is before FSDP2 or ZeRO-3 shards it, without its weights."""

    def in_shards(self, parameters: Shards, buffers: Tensors, by_blocks: bool, device: torch.device) -> ShardedWeights:
        """Makes the model plain again, in the dtypes that it had; its weights are shards that were made elsewhere.

        Args:
            parameters: the shards of all parameters, by name.
            buffers: the persistent ones, as training left them.
            by_blocks: whether one block at a time is gathered, or the whole model.
            device: where this rank computes.
        """
        model = self._model
        self._put_back()
        shards = {}
        for name, p in model.named_parameters():
            shards[name] = parameters.pop(name).to(p.dtype)
        new = {id(buffer): buffer.to(device) for buffer in model.buffers()}
        self._put_in(new, buffers, device)
        blocks = blocks_of(model) if by_blocks else []
        return ShardedWeights(model, shards, blocks, device)

    def taken_off(self, sharded: nn.Module, device: torch.device) -> ShardedWeights:
        """Makes the model plain again, and keeps its weights as they are sharded.

        Args:
            device: where this rank computes. Buffers, which are not sharded, are put there.
        """
        model = self._model
        let_go_of_whole_weights(sharded)
        trained = self._registered()
        layers = [module for module in self._classes if isinstance(module, FSDPModule)]
        for module in self._classes:
            _module_state_mapping.pop(module, None)  # else FSDP2 refuses to shard it a second time
        self._put_back()
        as_trained: dict[int, Tensor] = {}  # id of an empty parameter or a buffer -> what was in its place
        for place, tensor in self._registered().items():
            as_trained[id(tensor)] = trained.get(place, tensor)
        shards: Shards = {}
        new: dict[int, Tensor] = {}  # id of an empty parameter or a buffer -> what takes its place
        for name, tensor in named_tensors(model).items():
            if id(tensor) in new:  # it is tied, and its first name counts
                continue
            if isinstance(tensor, nn.Parameter):
                shards[name] = as_trained[id(tensor)].detach()
                # mixed precision trains in a wider dtype than that of the model that was passed in
                empty = torch.empty_like(tensor, dtype=shards[name].dtype)
                new[id(tensor)] = nn.Parameter(empty, tensor.requires_grad)
            else:
                new[id(tensor)] = as_trained[id(tensor)].to(device)
        replace_tensors_(contents(model), new)
        return ShardedWeights(model, shards, layers, device)

    def _registered(self) -> dict[tuple[nn.Module, str], Tensor]:
        """(module, name in it) -> the parameter or buffer that is there now."""
        registered = {}
        for module in self._classes:
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    registered[module, name] = tensor
        return registered

    @contextlib.contextmanager
    def whole_on_disk(
        self, sharded: nn.Module, device: torch.device, folder: str | Path, writes: bool
    ) -> Iterator[None]:
        """While open, the model is plain and has whole weights; see `ShardedWeights.whole_on_disk`."""
        states = {module: _module_state_mapping[module] for module in self._classes if module in _module_state_mapping}
        classes = {module: type(module) for module in self._classes}
        let_go_of_whole_weights(sharded)  # which could not be put back
        with restored(self._model):
            try:
                weights = self.taken_off(sharded, device)
                with weights.whole_on_disk(folder, writes):
                    yield
            finally:
                for module, cls in classes.items():
                    module.__class__ = cls
                _module_state_mapping.update(states)


class ShardedWeights(LayerByLayer):
    """The weights of a model as shards, beside the model itself, which is plain and whose own weights are on meta.

    All ranks call every method together, because a weight is gathered by all of them.

    Attributes:
        model: the plain model. Its buffers are real.
    """

    # what is zero ----------------------------------------------------------------------------------

    def zeros(self, partition: ZIGPartition) -> PruningPlan:
        """The plan that removes every ZIG that is exactly zero: one all-reduce of a number per ZIG."""
        slices, tensors = self._group(partition)
        nonzero = (Part(slice_, None, part != 0) for slice_, part in on_this_rank(slices, tensors))
        (num_nonzero,) = sum_over_zigs([nonzero], tensors, partition.num_zigs)  # (num_zigs,)
        return PruningPlan.removing((num_nonzero == 0).numpy(), partition)

    @torch.no_grad()
    def zero_(self, partition: ZIGPartition, plan: PruningPlan) -> None:
        """Zeroes, in place, the ZIGs that a plan removes."""
        slices, tensors = self._group(partition)
        removed = torch.from_numpy(plan.removed(partition))
        for rows in rows_of(removed, slices, tensors):
            part = local(tensors[rows.slice.param])
            part.index_fill_(rows.slice.dim, rows.index, 0)

    def _group(self, partition: ZIGPartition) -> tuple[tuple[Slice, ...], Shards]:
        """What the ZIGs are made of: slices, and the tensors that they belong to."""
        group = {axis.name: axis.group for axis in partition.axes}
        first_names = self._first_names()
        tensors = {}
        for name, tensor in partition.tensors(self.model).items():
            tensors[name] = self._weights.get(first_names[name], tensor)
        slices = slices_of(partition.axes, group, tensors, {})
        in_group = {slice_.param: tensors[slice_.param] for slice_ in slices}
        return slices, in_group

    # running ---------------------------------------------------------------------------------------

    def certify(self, cut: Cut, forwards: Sequence[Forward]) -> Certificate:
        """`hf_oto.certificate.certify`; each rank compares outputs on its own examples, and the worst rank counts."""
        model = self.model
        forwards = self._here(forwards)
        changes = self._changes(cut)
        _agree_on_arithmetic(model)
        with self.running(changes.zeroed()):
            exact, _ = exact_outputs(model, forwards)
            rounded = own_outputs(model, forwards)
        with self.running(changes.noisy()):
            exact_with_noise, _ = exact_outputs(model, forwards)
        invariance = largest_difference(exact, exact_with_noise)
        del exact_with_noise  # before the outputs of the cut model need their memory
        # the trial cuts buffers and sizes; of weights on meta it cuts the shapes
        with TrialCut(model, cut):
            exact_of_cut, tolerance = self._exact_outputs_of_cut(cut, forwards)
            with self.running(changes.cut()):
                rounded_of_cut = own_outputs(model, forwards)
        difference = largest_difference(exact, exact_of_cut)
        rounding = largest_difference(rounded, rounded_of_cut)
        of_ranks = of_all_ranks((invariance, difference, tolerance, rounding))
        worst = np.max(np.array(of_ranks), axis=0)  # nan where any rank has nan
        return Certificate(*worst.tolist())

    def run(self, forwards: Sequence[Forward]) -> None:
        """Runs the model once, so that what it raises is raised here."""
        with self.running():
            own_outputs(self.model, self._here(forwards))

    def moved_by_zeroing(self, cut: Cut, forwards: Sequence[Forward]) -> float:
        """How far outputs move, relative to their size, when what a cut removes is zeroed."""
        forwards = self._here(forwards)
        with self.running():
            before = own_outputs(self.model, forwards)
        changes = self._changes(cut)
        with self.running(changes.zeroed()):
            after = own_outputs(self.model, forwards)
        return max(of_all_ranks(largest_difference(before, after)))

    # the cut ---------------------------------------------------------------------------------------

    def keep_(self, compaction: Compaction, cut: Cut) -> None:
        """Cuts the model for good: its record, class, sizes and buffers, then one shard after the other."""
        change = self._changes(cut).cut()
        compaction.keep_(self.model, cut)
        for name, shard in self._weights.items():
            kept = change(name, whole(shard))
            self._weights[name] = divided(kept, like=shard)

    def measured(self, compaction: Compaction, rest: Cut, forwards: Sequence[Forward]) -> list[dict[str, Any]]:
        """The sizes and MACs of the dense model and of what a cut leaves; a latency would be that of gathering."""
        gone = compaction.gone_after(rest.removed)
        trials = [(compaction.trial_dense(self.model), np.zeros_like(gone)), (TrialCut(self.model, rest), gone)]
        measured = []
        for trial, gone_of_trial in trials:
            with trial as model:
                of_all: dict[str, Any] = size(model)
            work = compaction.partition.work
            if work is not None:
                num_gone = [int(part.sum()) for _, part in compaction.partition.split(gone_of_trial)]
                of_all["macs"] = round(work.left(np.array(num_gone)))
            measured.append(of_all)
        return measured

    def stock(
        self, partition: ZIGPartition, plan: PruningPlan, ties: Sequence[Tie], forwards: Sequence[Forward]
    ) -> bool:
        """Puts a stock model in the place of the cut one, whose config says its widths; whether there is one."""
        small = self.model
        try:
            with torch.device("meta"):
                stock = built_by_config(small, partition, plan, ties)
        except (RuntimeError, ValueError):  # the config has other demands
            return False
        shapes = {name: tensor.shape for name, tensor in named_tensors(small).items()}
        if shapes != {name: tensor.shape for name, tensor in named_tensors(stock).items()}:
            return False
        path_of_module = {module: path for path, module in small.named_modules()}
        layers = [stock.get_submodule(path_of_module[layer]) for layer in self._layers]
        new = {}
        buffers = dict(small.named_buffers())
        for name, buffer in stock.named_buffers():
            new[id(buffer)] = buffers[name]
        for name, p in stock.named_parameters():
            empty = torch.empty_like(p, dtype=self._weights[name].dtype)
            new[id(p)] = nn.Parameter(empty, p.requires_grad)
        replace_tensors_(contents(stock), new)
        stock.train(small.training)
        forwards = self._here(forwards)
        with self.running():
            outputs, tolerance = exact_outputs(small, forwards)
        of_stock = ShardedWeights(stock, self._weights, layers, self._device)
        with of_stock.running():
            outputs_of_stock, _ = exact_outputs(stock, forwards)
        if max(of_all_ranks(largest_difference(outputs, outputs_of_stock))) > tolerance:
            return False
        self.model, self._layers = stock, layers
        return True

    def put_on_(self, shard: Callable[[nn.Module, Sequence[nn.Module]], None]) -> BeforeSharding:
        """Lets FSDP2 shard the model again, and gives it its shards.

        Args:
            shard: shards a model without weights and its layers, in place, as it was sharded for training.
        """
        before = BeforeSharding(self.model)
        shard(self.model, self._layers)
        new = {}
        for name, p in self.model.named_parameters():
            new[id(p)] = nn.Parameter(self._weights.pop(name), p.requires_grad)
        replace_tensors_(contents(self.model), new)
        return before

    # saving ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def whole_on_disk(self, folder: str | Path, writes: bool) -> Iterator[None]:
        """While open, the model has whole weights. They lie in files, and take memory only when they are read.

        Args:
            folder: where the files are for the moment.
            writes: whether this rank gets the weights.
        """
        with contextlib.ExitStack() as stack:

            def make_folder() -> str:
                # disks of other machines keep files for as long as they are read, and then fail to delete the folder
                made = tempfile.TemporaryDirectory(prefix="weights-", dir=folder, ignore_cleanup_errors=True)
                return stack.enter_context(made)

            in_files = whole_in_files(self._weights, make_folder if writes else None)
            if writes:
                stack.enter_context(restored(self.model))
                new = {}
                for name, p in self.model.named_parameters():
                    new[id(p)] = nn.Parameter(in_files[name], p.requires_grad)
                replace_tensors_(contents(self.model), new)
                save_by_pieces_(self.model)
            yield


def _agree_on_arithmetic(model: nn.Module) -> None:
    """Tells all ranks whether the model computes in double: rank 0 alone has tried that before training."""
    in_own_dtype = broadcast_object_list([model in ONLY_AS_THEY_ARE])
    if in_own_dtype[0]:
        ONLY_AS_THEY_ARE.add(model)
