"""Running SGLang and vLLM servers with and without a draft, and measuring them over HTTP."""
