"""Shared by all tests: a tiny causal language model with random weights, saved as a folder, and a tiny data set."""

from __future__ import annotations

import gc
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
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # the models are tiny: a second thread only costs
ALPHABET = "0123456789+-=?abcdefghij "


def pytest_collection_finish() -> None:
    """Keep what was imported from the searches for garbage, of which accelerate makes one in every training."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def rows(tiny_model, sums) -> list[dict]:
    """The same as tokens, for transformers' Trainer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [row["prompt"] + row["completion"] for row in sums]
    tokens = [tokenizer(text, padding="max_length", max_length=8)["input_ids"] for text in texts]
    return [{"input_ids": row, "labels": row} for row in tokens]


class Hub:
    """A Hub on the loopback address: as much of its protocol as pushing and loading needs.

    Weights and pictures travel as on the real Hub without xet: announced in a batch, put to an address of their own,
    verified, and named by their digest in the commit; they are fetched through a redirection. All else travels inside
    the commit. Everybody writes to their own namespace only, and nobody else sees what is private there. Wrong
    requests are answered as by the real Hub where huggingface_hub looks at the answer.
    """

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.datasets: set[str] = set()
        self.users = {"hf_loopback": "me", "hf_stranger": "stranger"}
        self.objects: dict[str, bytes] = {}  # what was put, by its digest
        self.verified: set[str] = set()
        self.unwelcome: set[bytes] = set()  # what is refused when it is put
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

    def environment(self, home: Path, token: str = "hf_loopback") -> dict[str, str]:
        """Return the variables with which a new process uses this Hub, and `home` as its cache.

        `token` is one of `users`, or "" for nobody.
        """
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": token}
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

    def refuse(self, code: str, status: int = 404) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def user(self) -> str | None:
        """Who asks: None for nobody, "" for a token that is not known."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.hub.users.get(token, "") if token else None

    def may_write(self, repository: str) -> bool:
        """Whether who asks owns the repository; if not, this has answered."""
        user = self.user()
        if not user:
            self.answer({"error": "Unauthorized"}, 401, X_Error_Message="Invalid credentials in Authorization header")
        elif repository.split("/")[0] != user:
            self.answer({"error": "Forbidden"}, 403, X_Error_Message=f"You do not own {repository}")
        elif repository not in self.hub.commits and not self.path.startswith("/api/repos/"):
            self.refuse("RepoNotFound")
        else:
            return True
        return False

    def may_read(self, repository: str) -> bool:
        """Whether who asks sees the repository; if not, this has answered."""
        user = self.user()
        if user == "":
            self.answer({"error": "Unauthorized"}, 401, X_Error_Message="Invalid credentials in Authorization header")
        elif repository not in self.hub.commits or (
            repository in self.hub.private and repository.split("/")[0] != user
        ):
            self.refuse("RepoNotFound", 404 if user else 401)
        else:
            return True
        return False

    def do_POST(self) -> None:
        body = self.body()
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/lfs/verify/(\w+)", path):
            known = len(self.hub.objects.get(found[1], b"")) == json.loads(body)["size"]
            self.hub.verified |= {found[1]} if known else set()
            self.answer({}, 200 if known else 404)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            if self.may_write(found[1]):
                self.answer({"transfer": "basic", "objects": [self.place(o) for o in json.loads(body)["objects"]]})
        elif found := re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/main", path):
            repository, action = found.groups()
            if not self.may_write(repository):
                return
            if action == "preupload":
                modes = {file["path"]: is_large(file["path"]) for file in json.loads(body)["files"]}
                self.answer(
                    {
                        "files": [
                            {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                            for path, large in modes.items()
                        ]
                    }
                )
            else:
                self.commit(repository, [json.loads(line) for line in body.splitlines()])
        else:
            self.refuse("Unknown")

    def do_PUT(self) -> None:
        """Take a large file; its address is a secret of its own, so that no token comes with it."""
        body, digest = self.body(), self.path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != digest or body in self.hub.unwelcome:
            return self.answer({"error": "the content is not what the address says, or not welcome"}, 400)
        self.hub.objects[digest] = body
        return self.answer(b"")

    def create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or self.user()}/{asked['name']}"
        if not self.may_write(name):
            return
        known = name in self.hub.commits
        if not known:
            self.hub.commit(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
        self.answer({"url": f"{self.hub.endpoint}/{name}", "name": name}, 409 if known else 200)

    def place(self, wanted: dict) -> dict:
        """Where to put a large file; nowhere, if it is there."""
        urls = {"upload": f"/lfs/{wanted['oid']}", "verify": f"/lfs/verify/{wanted['oid']}"}
        actions = {name: {"href": self.hub.endpoint + url} for name, url in urls.items()}
        return wanted if wanted["oid"] in self.hub.objects else wanted | {"actions": actions}

    def commit(self, repository: str, steps: list[dict]) -> None:
        changes: dict[str, bytes | None] = {}
        for kind, value in ((step["key"], step["value"]) for step in steps):
            if kind == "deletedFile":
                changes[value["path"]] = None
            elif kind == "file":
                changes[value["path"]] = b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.verified:
                    return self.answer({"error": f"{value['path']} was not uploaded"}, 400)
                changes[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.commit(repository, changes)
        return self.answer({"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{sha}", "commitOid": sha})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            user = self.user()
            return self.answer({"type": "user", "name": user, "orgs": []}, 200 if user else 401)
        if found := re.fullmatch(r"/api/datasets/(.+?)(/revision/main)?", path):
            known = found[1] in self.hub.datasets
            return self.answer({"id": found[1]}) if known else self.refuse("RepoNotFound")
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            return self.answer(self.hub.objects[found[1]], ETag=f'"{found[1]}"')
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repository, kind, revision = found.groups()
            name = None
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            (repository, revision, name), kind = found.groups(), "file"
        else:
            return self.refuse("Unknown")
        if not self.may_read(repository):
            return None
        if (commit := self.hub.files(repository, revision or "main")) is None:
            return self.refuse("RevisionNotFound")
        sha, files = commit
        if kind == "file":
            return self.send_file(sha, files.get(name), is_large(name))
        listed = [{"type": "file", "path": p, "oid": sha, "size": len(files[p])} for p in sorted(files)]
        if kind == "tree":
            return self.answer(listed)
        siblings = [{"rfilename": p["path"]} for p in listed]
        private = repository in self.hub.private
        return self.answer({"id": repository, "sha": sha, "private": private, "siblings": siblings})

    def send_file(self, sha: str, content: bytes | None, large: bool) -> None:
        if content is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        if not large:
            return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)
        digest = hashlib.sha256(content).hexdigest()
        self.hub.objects[digest] = content  # also what a test committed itself
        linked = {"X_Linked_ETag": f'"{digest}"', "X_Linked_Size": str(len(content))}
        # Another host, as a store of large files is: huggingface_hub looks at the answers of the two differently.
        store = self.hub.endpoint.replace("127.0.0.1", "localhost")
        return self.answer(b"", 302, Location=f"{store}/lfs/{digest}", X_Repo_Commit=sha, **linked)

    do_HEAD = do_GET


def is_large(path: str) -> bool:
    """Whether a file travels apart from the commit, by the suffixes of a new repository's `.gitattributes`."""
    return path.endswith((".safetensors", ".bin", ".png"))


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


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    """Files of three tasks: sums scored by exact match, letters by loss, and yes-or-no questions by choice."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = random.Random(0)
    digit = lambda: generator.randrange(10)  # noqa: E731
    makers = {
        "sums": lambda a, b: (f"{a}+{b}=", f"={a + b}"),
        "letters": lambda a, b: (f"{'abcdefghij'[a]}-", "abcdefghij"[b]),
        "larger": lambda a, b: (f"{a}-{b}?", "a" if a > b else "b"),
    }
    for name, make in makers.items():
        for split, count in (("train", 24), ("test", 8)):
            rows = [make(digit(), digit()) for _ in range(count)]
            lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
            (folder / f"{name}_{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tree(tiny_model, task_folder, tmp_path) -> dict:
    """A recipe as plain values."""
    return {
        "model": str(tiny_model),
        "output": str(tmp_path / "run"),
        "data": str(task_folder),
        "tasks": {
            "sums": {"metric": "exact_match", "answer": "=(.*)"},
            "letters": {"train_samples": 16},
            "larger": {"metric": "choice", "choices": ["a", "b"], "test_samples": 5},
        },
        "tuner": {"peft_type": "PROPULSION", "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "disable_tqdm": True, "learning_rate": 0.01},
        "core": {"percent": 10.0},
        "evaluation": {"max_new_tokens": 4},
        "report": {"picture": False},
    }
