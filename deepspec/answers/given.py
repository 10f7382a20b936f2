"""Answers that the data has already: a log of the very target, or another's words when that is said.

Each is written as the template writes it, so that its ids are those that an engine would have been given and have given
back; ids that a log has, and rows of token ids, are taken as they are. How likely the target finds them is told for
every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from deepspec.answers.conversation import Conversation, UnusableError
from deepspec.answers.history import Histories
from deepspec.answers.likelihood import Likelihood
from deepspec.answers.params import GenerateParams
from deepspec.answers.rendered import rendered_answer
from deepspec.answers.shards import Sink
from deepspec.answers.turns import closed, end_of_answer
from deepspec.messages.message import Message
from deepspec.messages.prompt import Prompt


def answer(target: Any, prompts: Sequence[Prompt], params: GenerateParams, sink: Sink) -> None:
    """Write the rows of every prompt that has answers, with how likely the target finds them."""
    histories = Histories(target)
    likelihood = Likelihood(target)
    for prompt in prompts:
        try:
            if prompt.chat.input_ids:
                rows = [_tokens(target, prompt, params.max_length)]
                endings: list[str] = []
            else:
                rows, endings = _rows(target, prompt, params, histories)
        except UnusableError as error:
            sink.failed(prompt.id, str(error))
            continue
        likelihood.add(rows)
        sink.progress.tokens(sum(sum(row["loss_mask"]) for row in rows))
        sink.add_rows(prompt.id, rows, endings)


def _rows(
    target: Any, prompt: Prompt, params: GenerateParams, histories: Histories
) -> tuple[list[dict[str, Any]], list[str]]:
    chat = prompt.chat
    if not chat.slots()[0].recorded:
        raise UnusableError("the data has no answer to its first turn")
    conversation = Conversation(
        target, prompt, params.max_length, params.max_length, histories, rendered=True
    )
    while conversation.prompt_ids is not None:
        message = conversation.slot.recorded
        if message is None:
            conversation.endings.append("the last turn has no answer")
            break
        tokens, reason = _answer(target, conversation, message)
        if len(tokens) > conversation.room and conversation.answered:
            conversation.endings.append("the next answer would not fit")
            break
        conversation.add_answer(tokens, reason, message)
    return conversation.rows(), conversation.endings


def _answer(target: Any, conversation: Conversation, message: Message) -> tuple[list[int], str]:
    """Return the ids of a recorded answer and its finish reason: its log's, where it comes from one that has them."""
    chat = conversation.prompt.chat
    reply = chat.reply if message is chat.messages[-1] else {}
    reason = str(reply.get("finish_reason", "stop"))
    if "token_ids" not in reply:
        return rendered_answer(
            target,
            conversation.asked,
            message,
            chat.tools,
            chat.chat_template_kwargs,
            cut=reason == "length",
        ), reason
    if reply.get("prompt_token_ids", conversation.prompt_ids) != conversation.prompt_ids:
        raise UnusableError(
            "the log's ids of the prompt are not those of data/target's template; give the row as input_ids with a "
            "loss_mask"
        )
    return closed(target, reply["token_ids"], reason, end_of_answer(target)), reason


def _tokens(target: Any, prompt: Prompt, max_length: int) -> dict[str, Any]:
    """Return the row of a conversation that came as token ids."""
    ids, mask = list(prompt.chat.input_ids), list(prompt.chat.loss_mask)
    if max(ids) >= target.vocab_size:
        raise UnusableError(f"token {max(ids)} is none of the target's {target.vocab_size}")
    if len(ids) > min(max_length, target.max_length):
        raise UnusableError(f"the conversation has {len(ids)} tokens, more than {max_length}")
    ends = [
        max(positions)
        for masked, group in groupby(range(len(ids)), key=lambda i: mask[i])
        if masked and (positions := list(group))
    ]
    reasons = ["stop" if ids[end] in target.stop_ids else "length" for end in ends]
    return {
        "id": prompt.id,
        "source": prompt.source,
        "messages": [],
        "input_ids": ids,
        "loss_mask": mask,
        "finish_reasons": reasons,
    }
