"""A small byte-level BPE for Python, and loading or saving any Hugging Face tokenizer.

Quote tasks compare the next-token probabilities of `")` and `')`, so those pairs (and the opening ones) must
be single tokens wherever they stand in the text. They are cut out before BPE sees its input. `while`, which real code
has too seldom to be learned, is one token too, so that a loop's two headers are of equal length:

1. Split off every occurrence of the four pairs in `QUOTE_TOKENS`.
2. Split the rest into words with their leading space, digits, punctuation, and newline-plus-indentation runs.
3. Learn merges inside those pieces only, with the quote pairs removed; then give each pair an id of its own.
4. Where `while` is still in pieces, the last merges make room for those that join them.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from sparse_model.data.pieces import parts_of
from sparse_model.io.atomic import temporary_folder
from sparse_model.io.copied import check_copied
from sparse_model.io.local import local_path
from sparse_model.io.reading import read_json, typed

QUOTE_TOKENS = ('("', "('", '")', "')")
EOT = "<|endoftext|>"
_WORD = "while"

_QUOTE_PATTERN = r"""\(["']|["']\)"""
_PIECE_PATTERN = "|".join(
    (
        r"(?:\r?\n)+[ \t]*",  # line ends together with the indentation that follows them
        r" ?_*[\p{L}\p{M}]+",  # a word; snake_case falls apart before each underscore
        r" ?\p{N}",  # one digit
        r" ?_+",
        r" ?[^\s\p{L}\p{M}\p{N}_]+",  # punctuation
        r"[^\S\r\n]+(?!\S)",  # blanks, less the one that belongs to the next word
        r"\s",
    )
)
# What a tokenizer can be made from, the usual ones first, and what may say of which kind it is.
_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model", "tekken.json")
_BESIDE = ("tokenizer_config.json", "config.json")
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_SMALLEST_VOCAB = 1 + len(_BYTES) + len(QUOTE_TOKENS)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with exactly `vocab_size` tokens; the same documents give the same tokenizer.

    Ids: 0 is `EOT` (also bos, eos and pad), then the 256 bytes, the four quote pairs, and the learned merges.
    Decoding an encoded text gives that text back, whatever it holds.

    Raises:
        ValueError: `vocab_size` is below 261, or the documents hold too few repeated pairs to fill it.
    """
    if vocab_size < _SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(_BYTES)} bytes, {len(QUOTE_TOKENS)} quote tokens and"
            f" {EOT} already need {_SMALLEST_VOCAB}; choose a larger one, e.g. 512"
        )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer(quotes="removed")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(QUOTE_TOKENS) - 1, initial_alphabet=_BYTES, show_progress=False
    )
    learner.train_from_iterator((part for document in documents for part in parts_of(document)), trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges = _with_word([(left, right) for left, right in learned], _WORD)
    names = [EOT, *_BYTES, *QUOTE_TOKENS, *_names(merges)]
    if len(names) < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}, but the documents only yield {len(names)} tokens;"
            f" lower vocab_size to {len(names)} or train on more text"
        )
    vocab = {name: index for index, name in enumerate(names)}
    quote_merges = [(pair[0], pair[1]) for pair in QUOTE_TOKENS]

    backend = Tokenizer(models.BPE(vocab=vocab, merges=quote_merges + merges))
    backend.pre_tokenizer = _pre_tokenizer(quotes="isolated")
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOT,
        eos_token=EOT,
        pad_token=EOT,
        clean_up_tokenization_spaces=False,
    )


def _names(merges: list[tuple[str, str]]) -> list[str]:
    """What the merges make, in their order; two of them may make the same token."""
    return list(dict.fromkeys(left + right for left, right in merges))


def _with_word(merges: list[tuple[str, str]], word: str) -> list[tuple[str, str]]:
    """As many tokens as `merges` make, `word` among them: the last merges give way.

    Unchanged where `word` is a token already, or where so few merges are left that it would take half of them.
    """
    for dropped in range(len(word)):
        kept = merges[: len(merges) - dropped]
        vocab = {name: index for index, name in enumerate([*_BYTES, *_names(kept)])}
        pieces = [token.value for token in models.BPE(vocab=vocab, merges=kept).tokenize(word)]
        joined = ["".join(pieces[:count]) for count in range(1, len(pieces))]
        longer = kept + list(zip(joined, pieces[1:], strict=True))
        if len(_names(longer)) == len(_names(merges)) and dropped <= len(merges) // 2:
            return longer
    return merges


def _pre_tokenizer(quotes: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QUOTE_PATTERN), behavior=quotes),
            pre_tokenizers.Split(Regex(_PIECE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def check_quote_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that each of `QUOTE_TOKENS` encodes to one id.

    Raises:
        ValueError: one of them does not; the message names it and shows its pieces.
    """
    for token in QUOTE_TOKENS:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer encodes {token!r} as {tokenizer.convert_ids_to_tokens(ids)},"
                " but the quote tasks need it to be one token; use train_tokenizer() or a tokenizer that has"
                " it, such as gpt2's"
            )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hex digest of all that decides a tokenizer's ids: vocabulary, merges, pre-tokenizer, end-of-text id.

    Equal after saving and loading; independent of the padding or truncation of the last call.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    text = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write `tokenizer` into `folder`, creating it. Other files there stay; no file is ever half written."""
    folder = Path(folder)
    with temporary_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        if not folder.exists():
            temporary.rename(folder)
            return
        # tokenizer.json last: a folder that has it has the rest.
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "tokenizer.json"):
            os.replace(path, folder / path.name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file from which a tokenizer can be made."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder, or by its name on the Hugging Face hub; no code that comes with it is run.

    A folder holds `tokenizer.json`, `vocab.json` with `merges.txt`, or another file that transformers turns into a
    fast (Rust) tokenizer.

    Raises:
        FileNotFoundError: a local path (one that exists, starts with `.`, `/` or `~`, or has more than one
            slash) that is not a folder with such a file.
        OSError: a name that the hub does not know, or cannot be asked for.
        ValueError: a file that is damaged, or a tokenizer without a fast form.
    """
    name = str(name_or_folder)
    folder = local_path(name_or_folder)
    if folder is None:
        return _fast(_from_hub(name), name)
    if not has_tokenizer(folder):
        missing = f"has no {_FILES[0]}, {_FILES[1]} with merges.txt, or {_FILES[2]}"
        raise FileNotFoundError(
            f"no tokenizer at {name}: it {missing if folder.is_dir() else 'is not a folder'}; give a folder of "
            "save_tokenizer() or a hub name"
        )
    for path in (folder / file for file in (*_FILES, *_BESIDE)):
        if path.is_file():
            check_copied(path)
    try:
        tokenizer = _from_folder(folder)
    except BaseException as error:  # transformers and tokenizers raise a dozen types, Rust's panics among them
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        first = str(error).strip().splitlines() or [type(error).__name__]
        missing = "" if (folder / "tokenizer.json").is_file() else "; copy its tokenizer.json there, too"
        said = first[0].strip().removesuffix(" from one of:")  # a list that follows is of the library's own parts
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {said}{missing}") from error
    return _fast(tokenizer, name)


def _from_hub(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub client raises a dozen types, none of which names the remedy
        raise OSError(
            f"cannot load tokenizer {name!r}: it is no local folder, and the hub gave {type(error).__name__};"
            " check the spelling and the network, or give a folder that holds tokenizer.json"
        ) from error


def _from_folder(folder: Path) -> Any:
    named = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() and named.is_file():
        kind = typed(dict[str, Any], read_json(named, "copy it again", finite=False), named, "copy it again").get(
            "tokenizer_class"
        )
        if kind in _GENERIC:  # transformers would put the class that config.json's model usually has in its place
            return PreTrainedTokenizerFast.from_pretrained(str(folder))
    elif not (folder / "tokenizer.json").is_file() and (folder / "vocab.json").is_file():
        if not (folder / "merges.txt").is_file():
            raise ValueError("merges.txt is missing beside vocab.json; copy it there")
        if not any((folder / name).is_file() for name in _BESIDE):  # nothing says which kind: GPT-2's files
            return GPT2Tokenizer.from_pretrained(str(folder))
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _fast(tokenizer: Any, name: str) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {name!r} has no fast form (tokenizer.json); choose one that has")
    if not tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False):
        raise ValueError(f"tokenizer {name!r} knows no token: copy its vocabulary again")
    return tokenizer
