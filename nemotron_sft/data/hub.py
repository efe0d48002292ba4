"""The Hugging Face hub: its address, and files from it."""


def fetch(repo: str, commit: str, name: str) -> str:
    """Local path of a hub file, downloading what is missing."""
    import huggingface_hub

    return huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", revision=commit)


def endpoint() -> str:
    """The address of the hub, as the environment sets it."""
    from huggingface_hub import constants

    return constants.ENDPOINT
