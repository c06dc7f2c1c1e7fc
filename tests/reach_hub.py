"""Lets this process talk to the stand-in for the Hub, where no process has to be started for it."""

import contextlib

import datasets
import transformers.utils.hub
from fake_hub import TOKEN
from huggingface_hub import close_session, constants, hf_api
from running import status_of


@contextlib.contextmanager
def reaching(hub, monkeypatch):
    """Undoes, for a while, that the tests are offline: huggingface_hub and datasets look it up at every call."""
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(hf_api.api, "endpoint", hub.url)  # which was made on import; diffusers asks it for models
        patch.setattr(transformers.utils.hub, "_hf_api", None)  # which transformers makes when it asks first
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # which keeps what it knew of proxies
        yield
        close_session()


def push_to(hub, monkeypatch, main, default_name, folder, *flags, name=None):
    """Runs the `main` of a command that sends a folder to the stand-in; returns its exit status."""
    with reaching(hub, monkeypatch):
        return status_of(main, folder, name or default_name, *flags)
