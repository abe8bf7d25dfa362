"""Make an unmodified upstream peft know the method ``CONTROL``.

Neither peft nor transformers loads plug-ins: peft looks ``peft_type`` up in tables that only ``register_peft_method``
fills, and no entry point leads there. So importing this package registers the method. It relies on :data:`UPSTREAM`.
"""

import functools

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method
from peft.utils import transformers_weight_conversion as conversion
from transformers.core_model_loading import WeightRenaming

# Private lines of upstream that registration and tuner build on, by where they stand: a test looks for each of them.
UPSTREAM = (
    # registration: the name must be in the enum, whose members an adapter_config.json is matched with
    ("peft.utils.peft_types.register_peft_method", "if name.upper() not in list(PeftType):"),
    ("peft.config.PeftConfigMixin.from_peft_type", "config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]"),
    # rename_both_parts: transformers takes this function from its module at each call, and it returns a list
    (
        "transformers.integrations.peft.PeftAdapterMixin.load_adapter",
        "from peft.utils.transformers_weight_conversion import build_peft_weight_mapping",
    ),
    ("peft.utils.transformers_weight_conversion.build_peft_weight_mapping", "PEFT_TYPE_TO_PREFIX_MAPPING[peft_type]"),
    # ControlModel: the steps of injection and unloading that it overrides
    ("peft.tuners.tuners_utils.BaseTuner.inject_adapter", "self._prepare_adapter_config("),
    ("peft.tuners.tuners_utils.BaseTuner.inject_adapter", "self._create_and_replace("),
    ("peft.tuners.tuners_utils.BaseTuner.inject_adapter", "self._check_target_module_exists("),
    ("peft.tuners.tuners_utils.BaseTuner._unload_and_optionally_merge", "self._check_merge_allowed()"),
    ("peft.peft_model.PeftModel.forward", "self._enable_peft_forward_hooks("),
    # ControlConfig: the card is written after peft's own, on the way of every save
    ("peft.peft_model.PeftModel.save_pretrained", "peft_config.save_pretrained(output_dir"),
)


def add_peft_type(name: str) -> PeftType:
    """Return ``PeftType[name]``, adding the member if upstream has none.

    ``register_peft_method`` accepts only names in the ``PeftType`` enum, and an enum with members can not be
    subclassed, so the one way in is to do what ``EnumMeta`` does at class creation: make a ``str`` instance of
    the class, give it name and value, and enter it in the three places in which an enum looks members up.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    vars(member).update(__objclass__=PeftType, _sort_order_=len(PeftType))
    PeftType._member_names_.append(name)  # iteration and `in list(PeftType)`
    PeftType._member_map_[name] = member  # PeftType["CONTROL"] and, through EnumMeta, PeftType.CONTROL
    PeftType._value2member_map_[name] = member  # PeftType("CONTROL"), which reading adapter_config.json uses
    # Since Python 3.12 attribute access no longer falls back to _member_map_; type.__setattr__ passes by
    # EnumMeta's refusal to reassign members.
    type.__setattr__(PeftType, name, member)
    return member


def register() -> None:
    """Register ``ControlConfig`` and ``ControlModel`` with peft; a second call does nothing."""
    from .config import ControlConfig
    from .model import ControlModel

    if add_peft_type("CONTROL") not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="control", config_cls=ControlConfig, model_cls=ControlModel, prefix=ControlModel.prefix)
        rename_both_parts(conversion)


def rename_both_parts(conversion) -> None:
    """Let transformers' ``from_pretrained`` and ``load_adapter`` find the LoRA part of a mixed adapter.

    They insert the adapter's name into the keys of a checkpoint after the method's one registered prefix, which
    leaves ``lora_*`` keys without it: the LoRA part would be dropped with a warning. For CONTROL, and only for
    it, add the renaming that LoRA has, and the one for DoRA's magnitude, which upstream (0.21) lacks.
    """
    upstream = conversion.build_peft_weight_mapping

    @functools.wraps(upstream)
    def build_peft_weight_mapping(weight_conversions, adapter_name, peft_config=None):
        renamings = upstream(weight_conversions, adapter_name, peft_config=peft_config)
        if renamings and getattr(peft_config, "peft_type", None) == PeftType["CONTROL"]:
            renamings += [
                WeightRenaming(r"(lora_[^\.]*)", rf"\1.{adapter_name}"),
                WeightRenaming(r"(lora_magnitude_vector\.[^\.]*)$", r"\1.weight"),
            ]
        return renamings

    conversion.build_peft_weight_mapping = build_peft_weight_mapping
