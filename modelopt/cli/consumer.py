"""A program of its own that knows nothing of this library: load a directory with transformers + compressed-tensors, run it.

    python consumer.py DIR IDS.safetensors OUT.safetensors "prompt"

Reads `ids` [n, tokens], writes float32 `logits` [n, tokens, vocabulary] and prints the continuation of the prompt as JSON.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file


def consume(directory: str, ids_file: str, out_file: str, prompt: str) -> str:
    """Write the logits of the ids and return the JSON that the caller reads."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=load_file(ids_file)["ids"], use_cache=False).logits.float()
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(chat, return_tensors="pt", add_special_tokens=False)
        made = model.generate(**encoded, max_new_tokens=40, do_sample=False)
    save_file({"logits": logits.contiguous()}, out_file)
    text = tokenizer.decode(made[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    ours = [m for m in sys.modules if m.split(".")[0] == "modelopt"]
    return json.dumps({"text": text.strip(), "quantizer": type(model.hf_quantizer).__name__, "modules_of_modelopt": len(ours)})


if __name__ == "__main__":
    sys.stdout.write(consume(*sys.argv[1:5]) + "\n")
