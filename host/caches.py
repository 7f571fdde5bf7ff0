"""The host's EasyCache and LazyCache remember one course of sampling, so each window and each clip gets its own."""

from __future__ import annotations

from typing import Any

KEY = "easycache"  # in transformer_options, for both


def fresh_cache(transformer_options: dict) -> dict[str, Any]:
    """The entry for one more course of sampling beside that of the run; empty where the user has no cache."""
    holder = transformer_options.get(KEY)
    if holder is None:
        return {}
    fresh = holder.clone()
    fresh.start_t, fresh.end_t = holder.start_t, holder.end_t  # set when the run began; a clone lacks them
    return {KEY: fresh}


def works_in_windows(transformer_options: dict) -> bool:
    """Whether the cache is asked in every window, as EasyCache is; LazyCache sees the whole clip."""
    return hasattr(transformer_options.get(KEY), "uuid_cache_diffs")
