"""Every private name of another library that hf_oto relies on, once, and what hf_oto needs of it.

A private name may go in any release. test_private_names.py looks for each of these in the installed ones, and in
hf_oto for names that are not here. All of them were found in torch 2.13.0, in transformers 5.20.0, 5.23.0 and 5.24.0,
in accelerate 1.10.0 and 1.15.0, and in deepspeed 0.19.8: a release that lacks one is to be compared with these.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import torch.distributed._composable_state
import transformers as tf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def is_there(owner, name):
    return hasattr(owner, name)


def is_named_in_its_code(owner, name):
    """Of an attribute that its owner looks for on the objects of others, or puts there only at times."""
    return name in inspect.getsource(owner)


def is_named_in_its_file(file, name):
    """The same where importing the file would do much: DeepSpeed looks for accelerators and compilers."""
    return name in file.read_text()


class PrivateName(NamedTuple):
    """A private name of another library.

    `name` may be written with the parameters that hf_oto gives, or takes and hands on: they are the first ones then.
    """

    owner: Any  # a module, a class, an object that has it, or a file; None: of a library that isn't installed
    name: str
    need: str
    works: Callable[[Any, str], bool] = is_there

    @property
    def bare_name(self):
        return self.name.partition("(")[0]

    @property
    def parameters(self):
        """Those that are written beside the name; None if none are."""
        _, with_parameters, inside = self.name.rstrip(")").partition("(")
        return [p for p in inside.split(", ") if p] if with_parameters else None

    @property
    def holds(self):
        """Whether the owner still has it, with the same parameters."""
        try:
            if not self.works(self.owner, self.bare_name):
                return False
        except AttributeError:
            return False
        if self.parameters is None:
            return True
        found = inspect.signature(getattr(self.owner, self.bare_name)).parameters
        return [name for name in found if name != "self"][: len(self.parameters)] == self.parameters

    def __str__(self):
        owner = self.owner if isinstance(self.owner, type) or inspect.ismodule(self.owner) else type(self.owner)
        return f"{getattr(owner, '__module__', '')}.{owner.__name__}".lstrip(".") + f" {self.name}"


def module(name):
    """A private module: its parent has it."""
    parent, _, child = name.rpartition(".")
    importlib.import_module(name)
    return importlib.import_module(parent), child


def marks_a_parameter(fake_tensor, name):
    setattr(fake_tensor, name, False)
    before = isinstance(fake_tensor, nn.Parameter)
    setattr(fake_tensor, name, True)
    return isinstance(fake_tensor, nn.Parameter) and not before


def starts_the_names_of_hooks(optimizer, name):
    """An optimizer keeps its hooks, which belong to one object, under names that start so."""
    return name + "step_pre_hooks" in vars(optimizer)


def writes_weights_flat(rnn, name):
    """An RNN finds its weights by their addresses once more."""
    before = rnn._flat_weights
    getattr(rnn, name)()
    return rnn._flat_weights is not before


DEEPSPEED = importlib.util.find_spec("deepspeed")
OF_ZERO = DEEPSPEED and Path(DEEPSPEED.origin).with_name("utils") / "mixed_precision_linkage.py"
LINEAR, NORM, TENSOR = nn.Linear(1, 1), nn.BatchNorm1d(1), torch.zeros(1)
OPTIMIZER = torch.optim.SGD([nn.Parameter(TENSOR.clone())])
ADD = torch.ops.aten.add.Tensor
FAKE = FakeTensor(FakeTensorMode(), torch.empty(1, device="meta"), torch.device("cpu"))

OF_TORCH = [
    PrivateName(*module("torch._ops"), "OpOverload and HigherOrderOperator, what a dispatched operation is"),
    PrivateName(*module("torch._subclasses"), "FakeTensor and FakeTensorMode: tracing without computing"),
    PrivateName(*module("torch.utils._python_dispatch"), "TorchDispatchMode: every operation that a forward makes"),
    PrivateName(*module("torch.utils._pytree"), "tree_map and tree_leaves over what operations take and return"),
    PrivateName(*module("torch._C"), "where _DisableAutocast is"),
    PrivateName(torch._C, "_DisableAutocast", "in double nothing is cast, and no cast weight is kept"),
    PrivateName(ADD, "_schema", "names of arguments, and which of them an operation writes to or returns a view of"),
    PrivateName(FAKE, "_is_param", "a fake of a parameter is taken for one", marks_a_parameter),
    PrivateName(TENSOR.untyped_storage(), "_cdata", "what a tensor and its views have in common"),
    PrivateName(TENSOR, "_backward_hooks", "a parameter with a hook is not cut while it trains"),
    PrivateName(TENSOR, "_post_accumulate_grad_hooks", "nor is one with a hook of this kind"),
    PrivateName(LINEAR, "_parameters", "tensors swapped without the checks of setattr, tied ones in all places"),
    PrivateName(NORM, "_buffers", "the same of buffers"),
    PrivateName(NORM, "_non_persistent_buffers_set", "which buffers no file of weights has"),
    PrivateName(torch.distributed, "_composable_state", "where FSDP2 notes which modules it has sharded"),
    PrivateName(
        torch.distributed._composable_state, "_module_state_mapping", "what isn't noted can be sharded again"
    ),
    PrivateName(torch.utils._python_dispatch, "_disable_current_modes", "weights are gathered inside a forward"),
    PrivateName(nn.RNN(1, 1), "_init_flat_weights()", "an RNN takes note of its cut weights", writes_weights_flat),
    PrivateName(nn.modules.batchnorm, "_NormBase", "batch and instance norms, which keep `num_features`"),
    PrivateName(nn.modules.conv, "_ConvNd", "convolutions, which keep `in_channels`, `out_channels` and `groups`"),
    PrivateName(nn.modules.conv, "_ConvTransposeNd", "the same, transposed"),
    PrivateName(OPTIMIZER, "_optimizer_", "hooks are left out of copies and pickles", starts_the_names_of_hooks),
    PrivateName(
        torch.amp.GradScaler, "_step_supports_amp_scaling", "a scaler skips steps itself", is_named_in_its_code
    ),
    *(
        PrivateName(torch.ops.aten, name, "an operation of a traced forward, which a rule is about")
        for name in (
            "_cdist_forward", "_convolution", "_embedding_bag", "_embedding_bag_forward_only", "_euclidean_dist",
            "_fake_quantize_learnable_per_tensor_affine",
            "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_fused_rms_norm", "_grouped_mm",
            "_index_put_impl", "_local_scalar_dense", "_pack_padded_sequence", "_pad_packed_sequence",
            "_reshape_alias", "_to_copy", "_trilinear", "_unsafe_view", "_weight_norm_interface",
        )
    ),
]  # fmt: skip

OF_TRANSFORMERS = [
    PrivateName(
        tf.PreTrainedModel, "_finalize_model_loading(model, load_config, loading_info)",
        "the end of from_pretrained, where the record is compared with the weights",
    ),
    PrivateName(tf.PreTrainedModel, "_hf_peft_config_loaded", "whether save_pretrained writes an adapter alone"),
    PrivateName(tf.PreTrainedModel, "_auto_class", "code from a checkpoint: under which Auto class"),
    PrivateName(tf.PreTrainedModel, "_get_files_timestamps(working_dir)", "a push uploads the code beside weights"),
    PrivateName(
        tf.PreTrainedModel, "_is_hf_initialized", "loaded modules are not initialised again", is_named_in_its_code
    ),
    PrivateName(tf.AutoModel, "_model_mapping", "which Auto classes know a config: `auto_map` names them"),
    PrivateName(tf.Trainer, "_inner_training_loop(batch_size, args, resume_from_checkpoint)", "where a run begins"),
    PrivateName(tf.Trainer, "_run_epoch", "no step is made when a run is resumed at its last one"),
    PrivateName(
        tf.Trainer, "_wrap_model(model, training)", "called between the optimizer and accelerator.prepare"
    ),
    PrivateName(tf.Trainer, "_prepare_inputs(inputs)", "a batch as compute_loss takes it"),
    PrivateName(
        tf.Trainer(nn.Linear(1, 1), tf.TrainingArguments("out", use_cpu=True, report_to="none")),
        "_train_batch_size", "how many examples a batch has",
    ),
    PrivateName(
        tf.Trainer, "_loss_shifts_labels", "which positions a loss counts, as `num_items_in_batch` does",
        is_named_in_its_code,
    ),
    PrivateName(tf.Trainer, "_determine_best_metric(metrics, trial)", "before the target no checkpoint is the best"),
    PrivateName(tf.Trainer, "_save(output_dir)", "writes the model, and nothing of the run"),
    PrivateName(tf.Trainer, "_get_output_dir(trial)", "where checkpoints are written"),
    PrivateName(tf.Trainer, "_save_checkpoint(model, trial)", "a folder is incomplete until its last file"),
    PrivateName(tf.Trainer, "_save_rng_state(output_dir)", "written by every rank before the state of the run"),
    PrivateName(tf.Trainer, "_load_from_checkpoint(resume_from_checkpoint, model)", "all weights or an error"),
    PrivateName(tf.Trainer, "_load_best_model()", "all weights or an error"),
    PrivateName(tf.Trainer, "_load_optimizer_and_scheduler(checkpoint)", "an error that names the folder"),
    PrivateName(tf.Trainer, "_push_from_checkpoint(checkpoint_folder)", "a card that says what is pushed"),
]  # fmt: skip

OF_ACCELERATE = [
    PrivateName(
        accelerate.Accelerator, "_original_forward", "the forward before mixed precision", is_named_in_its_code
    ),
    PrivateName(
        accelerate.utils.extract_model_from_parallel, "_orig_mod", "DDP inside torch.compile", is_named_in_its_code
    ),
    PrivateName(accelerate.Accelerator, "_is_accelerate_prepared", "a model is prepared again", is_named_in_its_code),
]

OF_DEEPSPEED = [
    PrivateName(
        OF_ZERO, "_hp_mapping", "where a parameter lies in the flat weights of ZeRO-1 and 2", is_named_in_its_file
    ),
]

OF_PYTHON = [
    PrivateName(functools, "_lru_cache_wrapper", "the type of a cached function, which is kept and emptied"),
]

PRIVATE_NAMES = [*OF_TORCH, *OF_TRANSFORMERS, *OF_ACCELERATE, *OF_DEEPSPEED, *OF_PYTHON]
