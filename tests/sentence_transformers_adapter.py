"""A SentenceTransformer with a SEP adapter gives SEP's embeddings. It needs the package, so `.ci/run` calls it by name.

python -m pytest tests/sentence_transformers_adapter.py
"""

from __future__ import annotations

import pytest
import torch
from bundled import IMAGE_FILES, NAMES, shallow_clip
from peft import get_peft_model
from PIL import Image
from small_clip import perturb
from transformers import AutoProcessor, CLIPModel

from sep_peft import SEPClassifier, SEPConfig


def test_it_gives_the_embeddings_of_the_classifier(tmp_path):
    reason = "it needs the package sentence-transformers"
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
    clip, texts = shallow_clip(1), ["a slice of pizza", "a red dress"]
    peft_model = get_peft_model(CLIPModel.from_pretrained(clip), SEPConfig())
    perturb(peft_model)
    classifier = SEPClassifier.from_class_names(peft_model, AutoProcessor.from_pretrained(clip), NAMES).eval()
    classifier.save_pretrained(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(clip), device="cpu")

    def encode(inputs) -> torch.Tensor:
        return torch.from_numpy(model.encode(inputs, normalize_embeddings=True))

    before = encode(texts)
    model.load_adapter(str(tmp_path))
    torch.testing.assert_close(encode(texts), classifier.embed_texts(texts), rtol=1e-4, atol=1e-5)
    images = [Image.open(path).convert("RGB") for path in IMAGE_FILES]
    torch.testing.assert_close(encode(images), classifier.embed(IMAGE_FILES), rtol=1e-4, atol=1e-5)
    assert (before - encode(texts)).abs().max() > 1e-3

    # a folder with the processor is all it needs
    classifier.save_pretrained(tmp_path / "whole", save_processor=True)
    whole = sentence_transformers.SentenceTransformer(str(tmp_path / "whole"), device="cpu")
    found = torch.from_numpy(whole.encode(texts, normalize_embeddings=True))
    torch.testing.assert_close(found, classifier.embed_texts(texts), rtol=1e-4, atol=1e-5)
