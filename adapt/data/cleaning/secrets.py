"""Keys, tokens, passwords and addresses -> placeholders (`<EMAIL>`), so that no model learns them by heart.

The patterns are the issuers' documented prefixes; what has none (an arbitrary hexadecimal string) is not guessed at.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass

from adapt.components import cleaners
from adapt.data.cleaning.base import map_strings
from adapt.data.documents import Document

KEYS = {
    "PRIVATE_KEY": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:.|\n)*?(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)",
    "AWS_KEY": r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}(?![A-Z0-9])",
    "GITHUB_TOKEN": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255})",
    "GITLAB_TOKEN": r"\bgl(?:pat|dt|rt|ptt)-[A-Za-z0-9_-]{20,}",
    "SLACK_TOKEN": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}|https://hooks\.slack\.com/services/[A-Za-z0-9/]{20,}",
    "STRIPE_KEY": r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",
    "GOOGLE_KEY": r"\bAIza[A-Za-z0-9_-]{35}",
    "HF_TOKEN": r"\bhf_[A-Za-z0-9]{30,}",
    "NPM_TOKEN": r"\bnpm_[A-Za-z0-9]{36}",
    "PYPI_TOKEN": r"\bpypi-AgEI[A-Za-z0-9_-]{30,}",
    "SENDGRID_KEY": r"\bSG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}",
    "API_KEY": r"\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}",
    "JWT": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
}  # fmt: skip
PASSWORDS = {
    "CREDENTIALS": r"(?<=://)[^\s/:@<>\"']+:[^\s/@<>\"']+(?=@)",
    "SECRET": r"(?i)(?P<before>(?:passw(?:or)?d|secret(?:_access_key)?|api_?key|(?:auth|access)_token)[\"']?\s{0,3}[:=]\s{0,3})"
    r"[\"'][^\s\"'<>]{8,}[\"']",
}
ADDRESS = r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])"
EMAILS = {"EMAIL": f"<{ADDRESS}>|{ADDRESS}"}
IBANS = {"IBAN": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"}
HINTS = {
    "PRIVATE_KEY": ("PRIVATE KEY",), "AWS_KEY": ("AKIA", "ASIA", "ABIA", "ACCA"), "GITHUB_TOKEN": ("gh", "github_pat_"),
    "GITLAB_TOKEN": ("gl",), "SLACK_TOKEN": ("xox", "hooks.slack.com"), "STRIPE_KEY": ("k_live_", "k_test_"),
    "GOOGLE_KEY": ("AIza",), "HF_TOKEN": ("hf_",), "NPM_TOKEN": ("npm_",), "PYPI_TOKEN": ("pypi-",),
    "SENDGRID_KEY": ("SG.",), "API_KEY": ("sk-",), "JWT": ("eyJ",), "CREDENTIALS": ("://",), "EMAIL": ("@",),
}  # fmt: skip
"""Part of every match, where there is one: looking for it is much cheaper than the pattern."""
PHONES = {"PHONE": r"(?<![\w+])(?:\+|00)\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}(?!\w)"}


@dataclass(frozen=True, kw_only=True)
class SecretsConfig:
    keys: bool = True
    """Private key blocks and the tokens of well-known services."""
    passwords: bool = True
    """Credentials in addresses (`https://user:password@host`) and quoted values of password, secret, api_key."""
    emails: bool = True
    """E-mail addresses."""
    ibans: bool = False
    """International bank account numbers, by their check digits."""
    phones: bool = False
    """Phone numbers in international form."""


class Secrets:
    sequential = False

    def __init__(self, config: SecretsConfig):
        chosen = (
            (config.keys, KEYS),
            (config.passwords, PASSWORDS),
            (config.emails, EMAILS),
            (config.ibans, IBANS),
            (config.phones, PHONES),
        )
        self.patterns = [
            (name, HINTS.get(name, ()), re.compile(p)) for on, patterns in chosen if on for name, p in patterns.items()
        ]

    def __call__(self, document: Document) -> Document | str:
        """`meta["secrets"]` counts what was replaced, by placeholder."""
        counts: Counter[str] = Counter(document.meta.get("secrets"))
        changed = map_strings(document, lambda text: self.scrub(text, counts))
        return (
            document
            if changed is document
            else dataclasses.replace(changed, meta=changed.meta | {"secrets": dict(counts)})
        )

    def scrub(self, text: str, counts: Counter[str]) -> str:
        for name, hints, pattern in self.patterns:
            if hints and not any(hint in text for hint in hints):
                continue

            def replace(match: re.Match, name: str = name) -> str:
                if name == "IBAN" and not _is_iban(match[0]):
                    return match[0]
                counts[name] += 1
                before = match.groupdict().get("before") or ""
                return f'{before}"<{name}>"' if before else f"<{name}>"

            text = pattern.sub(replace, text)
        return text


def _is_iban(text: str) -> bool:
    """ISO 7064 mod 97-10: with the first four characters at the end and letters as numbers, the remainder is 1."""
    compact = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


@cleaners.register("secrets")
def secrets(config: SecretsConfig) -> Secrets:
    return Secrets(config)
