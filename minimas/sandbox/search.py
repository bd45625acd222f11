"""Asks Tavily (api.tavily.com) what the web says; the key is in the environment variable TAVILY_API_KEY."""

import json
import os
import urllib.request

MAX_PAGES = 4
MAX_CONTENT = 320  # characters of a page
SEARCH_URL = "https://api.tavily.com/search"


def search(query: str) -> str:
    """The first pages that Tavily finds for a query: title, address, content; or a text that says what failed."""
    key = os.environ.get("TAVILY_API_KEY")
    if not key:
        return "Search is not available: TAVILY_API_KEY is not set."
    request = urllib.request.Request(
        SEARCH_URL,
        json.dumps({"query": query, "search_depth": "advanced"}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            found = json.load(reply)["results"][:MAX_PAGES]
        pages = [
            page_text(n, p.get("title", ""), p.get("url", ""), p.get("content", ""))
            for n, p in enumerate(found, 1)
        ]
    except Exception as e:  # a reply may break off, be no JSON, or be nested too deep
        return f"[search error] {type(e).__name__}: {e}"
    if not pages:
        return f"Query: {query}\n[no search results]"
    return "\n".join([f"Query: {query}", "Results:", *pages])


def page_text(n: int, title: str, url: str, content: str) -> str:
    """What an agent is shown of the n-th page."""
    content = " ".join(content.split())
    if len(content) > MAX_CONTENT:
        content = content[:MAX_CONTENT].rstrip() + " ..."
    return f"[{n}] {title}\nURL: {url}\n{content}"
