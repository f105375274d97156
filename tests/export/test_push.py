from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import get_session

from adapt.errors import UserError
from adapt.export.push import push
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    folder = tiny.save_tiny(tmp_path / "export")
    (folder / "README.md").write_text("# card")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("x")
    return folder


class Hub:
    """Stands for huggingface_hub.HfApi: remembers the calls, and fails where told to."""

    def __init__(self):
        self.calls, self.fail = [], {}

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name in self.fail:
                raise self.fail[name]
            return "https://huggingface.co/org/name/commit/abc"

        return call


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def refusal(status):
    http = type(get_session()).__module__.split(".")[0]  # the HTTP client huggingface_hub was built on
    module = __import__(http)
    response = module.Response(status, request=module.Request("POST", "https://huggingface.co/api"))
    return errors.HfHubHTTPError(f"{status} error", response=response)


def test_one_commit_with_everything(folder, hub):
    done = push(folder, "org/name", private=True, revision="v2", message="Second try")
    names = [name for name, *_ in hub.calls]
    assert names == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][2]["private"] is True
    assert hub.calls[0][2]["exist_ok"] is True
    upload = hub.calls[2][2]
    assert (upload["repo_id"], upload["revision"], upload["commit_message"]) == ("org/name", "v2", "Second try")
    assert done.url.endswith("abc")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= dict(done.files).keys()


def test_a_dry_run_lists_and_sends_nothing(folder, hub):
    done = push(folder, "org/name", dry_run=True)
    assert hub.calls == []
    assert done.url is None
    sizes = dict(done.files)
    assert sizes["README.md"] == 6
    assert not [name for name in sizes if "junk" in name]
    assert done.total_bytes == sum(sizes.values())
    assert "0.00 MB  README.md" in str(done)
    assert str(done).endswith("dry run: nothing was sent")


@pytest.mark.parametrize(
    "step, error, message",
    [
        ("create_repo", refusal(401), "hf auth login"),
        ("create_repo", refusal(403), "nothing was sent yet"),
        ("upload_folder", refusal(502), r"an error of its own.*none of these files is visible"),
        (
            "upload_folder",
            ConnectionResetError("connection reset"),
            r"broke off .connection reset.*Run the same command",
        ),
        ("upload_folder", KeyboardInterrupt(), r"interrupted.*none of these files is visible.*Run the same command"),
    ],
)
def test_a_failed_upload_says_what_is_there_and_what_to_do(folder, hub, step, error, message):
    hub.fail[step] = error
    with pytest.raises(UserError, match=message):
        push(folder, "org/name")
    assert hub.calls[-1][0] == step
    hub.fail.clear()
    assert push(folder, "org/name").url  # the same command goes on


def test_what_is_not_a_usable_model_is_not_pushed(folder, hub, tmp_path):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError) as raised:
        push(folder, "name")
    text = str(raised.value)
    for part in (
        "model.safetensors is damaged",
        "tokenizer.json is missing",
        "config.json cannot be read",
        "ORGANISATION/NAME",
    ):
        assert part in text
    with pytest.raises(UserError, match="there is no such folder"):
        push(tmp_path / "nothing", "org/name")
    assert hub.calls == []


def test_a_shard_the_index_names_must_be_there(tmp_path, hub):
    folder = tmp_path / "sharded"
    tiny.tiny_model().save_pretrained(folder, max_shard_size="40KB")
    tiny.tiny_tokenizer().save_pretrained(folder)
    assert push(folder, "org/name", dry_run=True)
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(UserError, match="is missing, the index names it"):
        push(folder, "org/name")


@pytest.mark.parametrize("name", ["a/b/c", "org/na me", "-bad/name"])
def test_names_the_hub_would_refuse(folder, hub, name):
    with pytest.raises(UserError, match="--repo"):
        push(folder, name)
