"""Shared by all tests: a tiny causal language model with random weights, saved as a folder, and a tiny data set."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # the models are tiny: a second thread only costs
ALPHABET = "0123456789+-=?abcdefghij "


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a two-layer Llama of width 16 and a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums() -> Dataset:
    """Additions of one-digit numbers in prompt-completion form."""
    generator = random.Random(0)
    pairs = [(generator.randrange(10), generator.randrange(10)) for _ in range(64)]
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in pairs])


class Hub:
    """A Hub on the loopback address: as much of its protocol as pushing and loading small files needs.

    Every file counts as a regular one, so that it travels inside the commit, without LFS or xet. Wrong requests are
    answered as the real Hub does where huggingface_hub looks at the answer: 404 with an error code, 409 for a
    repository that exists.
    """

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def commit(self, repository: str, changes: dict[str, bytes | None]) -> str:
        """Add, replace and (with None) remove files; return the commit's id."""
        history = self.commits.setdefault(repository, [])
        files = (history[-1][1] if history else {}) | changes
        sha = hashlib.sha1(f"{repository} {len(history)}".encode()).hexdigest()
        history.append((sha, {path: content for path, content in files.items() if content is not None}))
        return sha

    def files(self, repository: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """Return the id and the files of a commit, by default the latest, or None if there is no such commit."""
        history = self.commits.get(repository, [])
        return next((c for c in reversed(history) if revision in ("main", c[0])), None)

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables with which a new process uses this Hub, and `home` as its cache."""
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_loopback"}
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return os.environ | settings | switches | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}


class HubHandler(BaseHTTPRequestHandler):
    """Answers the requests of huggingface_hub."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        """Keep the tests' output clean."""

    def answer(self, body: bytes | dict | list, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in self.hub.commits
            if not known:
                self.hub.commit(name, {})
            self.answer({"url": f"{self.hub.endpoint}/{name}", "name": name}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/main", path):
            repository, action = found.groups()
            if repository not in self.hub.commits:
                self.refuse("RepoNotFound")
            elif action == "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
            else:
                steps = [json.loads(line) for line in body.splitlines()]
                added = [step["value"] for step in steps if step["key"] == "file"]
                removed = {step["value"]["path"]: None for step in steps if step["key"] == "deletedFile"}
                sha = self.hub.commit(repository, removed | {a["path"]: b64decode(a["content"]) for a in added})
                self.answer({"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{sha}", "commitOid": sha})
        else:
            self.refuse("Unknown")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repository, kind, revision = found.groups()
            name = None
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            (repository, revision, name), kind = found.groups(), "file"
        else:
            return self.refuse("Unknown")
        if repository not in self.hub.commits:
            return self.refuse("RepoNotFound")
        if (commit := self.hub.files(repository, revision or "main")) is None:
            return self.refuse("RevisionNotFound")
        sha, files = commit
        if kind == "file":
            if name not in files:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            return self.answer(files[name], ETag=etag, X_Repo_Commit=sha)
        listed = [{"type": "file", "path": p, "oid": sha, "size": len(files[p])} for p in sorted(files)]
        if kind == "tree":
            return self.answer(listed)
        return self.answer({"id": repository, "sha": sha, "siblings": [{"rfilename": p["path"]} for p in listed]})

    do_HEAD = do_GET


@pytest.fixture(scope="session")
def hub(tiny_model) -> Iterator[Hub]:
    """A Hub on the loopback address that holds the tiny model as `me/tiny`.

    The tests' own process stays offline; `hub.environment` is for processes that the tests start.
    """
    hub = Hub()
    hub.commit("me/tiny", {file.name: file.read_bytes() for file in tiny_model.iterdir()})
    threading.Thread(target=hub.server.serve_forever, daemon=True).start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
