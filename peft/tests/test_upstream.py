"""What the registration does to upstream peft: adds CONTROL, and changes nothing else."""

import copy
import inspect
import pickle
import pkgutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from peft.utils import transformers_weight_conversion as conversion
from tiny_models import FAMILIES, build, is_adapter, logits, randomize_adapters

from peft_control import ControlConfig, ControlModel
from peft_control.registration import UPSTREAM, add_peft_type, register


def test_the_enum_member_and_the_tables():
    member = PeftType("CONTROL")
    assert member is PeftType["CONTROL"] is PeftType.CONTROL and isinstance(member, PeftType) and member == "CONTROL"
    assert list(PeftType).count(member) == 1 and len({hash(m) for m in PeftType}) == len(PeftType)
    assert pickle.loads(pickle.dumps(member)) is member is copy.deepcopy(member)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is ControlConfig and PEFT_TYPE_TO_TUNER_MAPPING[member] is ControlModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "control_"
    assert PeftConfig.from_peft_type(peft_type="CONTROL", control_rank=5).control_rank == 5
    before = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), conversion.build_peft_weight_mapping
    register()
    assert add_peft_type("LORA") is PeftType.LORA
    assert before == (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), conversion.build_peft_weight_mapping)


FRESH = """
import pickle, sys
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping

types, tuners = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)
config = pickle.loads(bytes.fromhex(sys.argv[1]))  # a spawned worker's way in: it names peft_control.config
import peft_control
assert config == peft_control.ControlConfig(control_rank=5), config
assert list(PeftType) == [*types, PeftType.CONTROL]
del PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CONTROL]
assert PEFT_TYPE_TO_TUNER_MAPPING == tuners
print("fresh", config.peft_type.value)
"""


@pytest.mark.slow
def test_a_fresh_process():
    config = pickle.dumps(ControlConfig(control_rank=5)).hex()
    result = subprocess.run([sys.executable, "-c", FRESH, config], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "fresh CONTROL\n", result.stderr


def test_the_lora_part_of_a_mixed_adapter_is_upstreams_lora():
    inputs = FAMILIES["llama"].inputs()
    fields = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "use_dora": True}
    lora = randomize_adapters(get_peft_model(build("llama"), LoraConfig(**fields)).eval())
    mixed = get_peft_model(build("llama"), ControlConfig(**fields)).eval()  # its control is still zero
    weights = {name: p for name, p in lora.named_parameters() if is_adapter(name)}
    missing = mixed.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all(type(p) is torch.nn.Parameter for p in weights.values())
    assert torch.equal(logits(mixed, inputs), logits(lora, inputs))


@pytest.mark.parametrize(("place", "line"), UPSTREAM)
def test_what_we_build_on_still_stands_upstream(place, line):
    """Fails where a new peft or transformers moves what registration.py and model.py rely on."""
    advice = "read what upstream does now, then mend registration.py or model.py and its table UPSTREAM"
    try:
        found = pkgutil.resolve_name(place)
    except (ImportError, AttributeError):
        pytest.fail(f"{place} is gone: {advice}")
    assert line in inspect.getsource(found), f"{place} no longer says {line!r}: {advice}"
