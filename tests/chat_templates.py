"""Chat templates in the manner of real families, in our own words and no longer than what tests need.

Each family says which of its tokens are special, which of them end an answer, and how its models write an answer, a
thought before it, and a tool call.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.fake_target import FakeTarget

SYSTEM_FIRST = (
    "{% set ns = namespace(system='', rest=messages) %}"
    "{% if messages[0].role in ('system', 'developer') %}"
    "{% set ns.system = messages[0].content %}{% set ns.rest = messages[1:] %}{% endif %}"
)
LAST_USER = (
    "{% set last = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
)
HERMES_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ system }}Tools:\n<tools>\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "</tools><|im_end|>\n{% elif system %}<|im_start|>system\n{{ system }}<|im_end|>\n{% endif %}"
)
HERMES_CALLS = (
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
)
HERMES_RESULT = "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"


def chatml(assistant: str, opening: str = "", before: str = "") -> str:
    """A ChatML template with Hermes' tools; `assistant` writes one of its turns, `opening` begins a generation."""
    return (
        before
        + "{% set system = messages[0].content ~ '\n' if messages[0].role == 'system' else '' %}"
        + HERMES_TOOLS
        + "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        + "{% elif m.role == 'tool' %}"
        + HERMES_RESULT
        + "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
        + assistant
        + "<|im_end|>\n{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n"
        + opening
        + "{% endif %}"
    )


QWEN3 = chatml(
    "{% set thought = m.reasoning_content or '' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > last.user and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ content }}" + HERMES_CALLS,
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    LAST_USER,
)
SMOLLM3 = chatml(
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}"
    "{{ m.content }}" + HERMES_CALLS,
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}",
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}"
    "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{% if tools and m.role == 'user' and loop.index0 < 2 %}{{ tools | tojson }}\n\n{% endif %}"
    "{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    LAST_USER
    + "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}"
    "{% if tools and loop.index0 == last.user %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}"
    "[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids of tool calls have 9 characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{{ ', ' if not loop.last }}{% endfor %}]</s>"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
HARMONY = (
    LAST_USER + "<|start|>system<|message|>You are a chat model.<|end|>"
    "{% for m in messages %}{% if m.role in ('system', 'developer') %}<|start|>developer<|message|>{{ m.content }}"
    "{% if tools %}\nnamespace functions {{ tools | tojson }}{% endif %}<|end|>"
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ last_call.name }} to=assistant<|channel|>commentary"
    "<|message|>{{ m.content }}<|end|>"
    "{% else %}{% if '<|channel|>' in m.content %}{{ raise_exception('pass thoughts as thoughts') }}{% endif %}"
    "{% set thought = m.reasoning_content %}{% set late = loop.index0 > last.user %}"
    "{% if thought and late %}<|start|>assistant<|channel|>analysis<|message|>{{ thought }}<|end|>{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    "<|start|>assistant to=functions.{{ c.function.name }}<|channel|>commentary json<|message|>"
    "{{ c.function.arguments | tojson }}<|call|>{% else %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DEEPSEEK = (
    "<bos>{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<User>{{ m.content }}"
    "{% elif m.role == 'tool' %}<output>{{ m.content }}</output>"
    "{% else %}<Assistant>{{ m.content.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}\n```json\n"
    "{{ '' + c.function.arguments }}\n```</call>{% endfor %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
GLM = (
    LAST_USER + "[gMASK]<sop>{% if tools %}<|system|>\n{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}<|system|>\n{{ m.content }}"
    "{% elif m.role == 'user' %}<|user|>\n{{ m.content }}"
    "{{ '/nothink' if enable_thinking is defined and not enable_thinking else '' }}"
    "{% elif m.role == 'tool' %}<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|assistant|>\n{% set content = m.content %}{% set thought = m.reasoning_content %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{% if loop.index0 > last.user and thought %}<think>{{ thought | trim }}</think>"
    "{% else %}<think></think>{% endif %}"
    "\n{{ content | trim }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}\n"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n"
    "{% endfor %}</tool_call>{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}"
)
GRANITE = (
    "{% if tools %}<|start_of_role|>available_tools<|end_of_role|>{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}<|start_of_role|>{{ 'tool_response' if m.role == 'tool' else m.role }}<|end_of_role|>"
    "{% if m.tool_calls %}<|tool_call|>[{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{{ ", " if not loop.last }}'
    "{% endfor %}]{% else %}{{ m.content }}{% endif %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template and how its models write.

    Args:
        thought, call: what a model writes of a thought and of `look(place="Paris")`; None: it has none.
        kept: whether earlier turns stay as they were written.
        system: whether there may be a system prompt.
        stop_of_call: the stop token behind a call, where it is not the first.
    """

    template: str
    special: tuple[str, ...]
    stops: tuple[str, ...]
    thought: str | None = None
    call: str | None = None
    kept: bool = True
    system: bool = True
    answer: str = "{}"
    stop_of_call: str | None = None
    options: dict = field(default_factory=dict)

    def target(self) -> FakeTarget:
        """Return a target with this template."""
        return FakeTarget(self.template, self.special, self.stops, **self.options)


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HERMES_CALL = '<tool_call>\n{"name": "look", "arguments": {"place": "Paris"}}\n</tool_call>'
THINKING = "<think>\nHm, {}\n</think>\n\n"
FAMILIES = {
    "chatml": Family(chatml("{{ m.content }}"), IM, ("<|im_end|>",)),
    "hermes": Family(chatml("{{ m.content }}" + HERMES_CALLS), IM, ("<|im_end|>",), call=HERMES_CALL),
    "qwen3": Family(QWEN3, IM, ("<|im_end|>", "<|endoftext|>"), THINKING, HERMES_CALL, kept=False),
    "qwen3, no thinking": Family(
        QWEN3,
        IM,
        ("<|im_end|>", "<|endoftext|>"),
        call=HERMES_CALL,
        kept=False,
        options={"enable_thinking": False},
    ),
    "smollm3": Family(SMOLLM3, IM, ("<|im_end|>",), THINKING, HERMES_CALL),
    "smollm3, no thinking": Family(
        SMOLLM3, IM, ("<|im_end|>",), call=HERMES_CALL, options={"enable_thinking": False}
    ),
    "llama 3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        ("<|eot_id|>", "<|eom_id|>"),
        call='{"name": "look", "parameters": {"place": "Paris"}}',
    ),
    "gemma": Family(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        ("<end_of_turn>", "<eos>"),
        system=False,
    ),
    "mistral": Family(
        MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ("</s>",),
        call='[TOOL_CALLS][{"name": "look", "arguments": {"place": "Paris"}, "id": "a1b2c3d4e"}]',
        kept=True,
    ),
    "harmony": Family(
        HARMONY.replace("{{ last_call.name }}", "look"),
        ("<|startoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
        ("<|return|>", "<|call|>"),
        thought="<|channel|>analysis<|message|>Hm, {}<|end|><|start|>assistant",
        call=' to=functions.look<|channel|>commentary json<|message|>{"place": "Paris"}',
        kept=False,
        answer="<|channel|>final<|message|>{}",
        stop_of_call="<|call|>",
    ),
    "deepseek": Family(
        DEEPSEEK,
        ("<bos>", "<eos>", "<User>", "<Assistant>", "<call>", "</call>", "<output>", "</output>"),
        ("<eos>",),
        thought="Hm, {}\n</think>\n\n",
        call='<call>look\n```json\n{"place": "Paris"}\n```</call>',
        kept=False,
    ),
    "glm": Family(
        GLM,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        ("<|user|>", "<|observation|>", "<|endoftext|>"),
        thought="\n<think>Hm, {}</think>\n",
        call="\n<tool_call>look\n<arg_key>place</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
        kept=False,
        stop_of_call="<|observation|>",
    ),
    "granite": Family(
        GRANITE,
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        ("<|end_of_text|>",),
        call='<|tool_call|>[{"name": "look", "arguments": {"place": "Paris"}}]',
    ),
}
