"""Plugin of vLLM: narrowed Llamas run in its own layers, not in transformers'. It finds this where it is installed."""


def register() -> None:
    """Tell vLLM the class of narrowed Llamas, which is imported when one is loaded."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("TransActForCausalLM", "transact_vllm.llama:TransActForCausalLM")
