"""Writes hidden.json: the last hidden states that transformers computes for the golden checkpoints.

    python models/tests/golden/make_hidden.py

Needs torch and transformers 5, and the folders that make_golden.py wrote. For every checkpoint the file has the mean,
over the first NUM_PROMPT_TOKENS tokens of its golden.safetensors, of `last_hidden_state` in f32: after the final norm,
as embeddings are pooled.
"""

import json
import pathlib

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from make_golden import NUM_PROMPT_TOKENS, fix_dynamic_scaling

HERE = pathlib.Path(__file__).parent


def mean_hidden_state(folder):
    tokens = load_file(folder / "golden.safetensors")["tokens"][None, :NUM_PROMPT_TOKENS].long()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    fix_dynamic_scaling(model)
    with torch.no_grad():
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    return states.mean(dim=0)


def main():
    folders = sorted(path.parent for path in HERE.glob("*/golden.safetensors"))
    means = {folder.name: mean_hidden_state(folder).tolist() for folder in folders}
    lines = [f"  {json.dumps(name)}: {json.dumps([float(f'{value:.9g}') for value in mean])}" for name, mean in means.items()]
    (HERE / "hidden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
