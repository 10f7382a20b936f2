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
    "{% set thought = m.thinking %}{% set late = loop.index0 > last.user %}"
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
QWEN_CODER = chatml(
    "{{ m.content }}{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}\n{% endif %}"
    "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>{% endfor %}"
)
PYTHONIC = chatml(
    "{{ m.content }}{% if m.tool_calls %}<|tool_call_start|>[{% for c in m.tool_calls %}{{ c.function.name }}("
    '{% for k, v in c.function.arguments.items() %}{{ k }}={{ "\'" ~ v ~ "\'" if v is string else v }}'
    "{{ ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]<|tool_call_end|>{% endif %}"
)
MINIMAX = (
    SYSTEM_FIRST
    + "{% if ns.system or tools %}]~b]system\n{{ ns.system }}{{ tools | tojson if tools }}[e~[\n{% endif %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}]~b]user\n{{ m.content }}[e~[\n"
    "{% elif m.role == 'tool' %}]~b]tool\n<response>{{ m.content }}</response>[e~[\n"
    "{% else %}]~b]ai\n{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].strip() %}{% endif %}"
    "{% if thought and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}"
    "{% if m.tool_calls %}\n<minimax:tool_call>\n{% for c in m.tool_calls %}"
    '<invoke name="{{ c.function.name }}">\n{% for k, v in c.function.arguments.items() %}'
    '<parameter name="{{ k }}">{{ v if v is string else v | tojson }}</parameter>\n{% endfor %}</invoke>\n'
    "{% endfor %}</minimax:tool_call>{% endif %}[e~[\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}"
)
KIMI = (
    "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% if messages[0].role != 'system' %}<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
    "{% endif %}"
    "{% for m in messages %}{% if m.role in ('system', 'tool') %}<|im_system|>{{ m.role }}<|im_middle|>"
    "{% else %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{% endif %}"
    "{% if m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}<|tool_calls_section_begin|>{% for c in m.tool_calls %}<|tool_call_begin|>"
    "functions.{{ c.function.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>"
    "{{ c.function.arguments | tojson }}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
COMMAND = (
    "{% if tools %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ tools | tojson }}<|END_OF_TURN_TOKEN|>{% endif %}"
    "{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>{% if m.tool_calls %}<|START_ACTION|>[\n"
    '{% for c in m.tool_calls %}    {"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ c.function.name }}", '
    '"parameters": {{ c.function.arguments | tojson }}}{{ "," if not loop.last }}\n{% endfor %}]<|END_ACTION|>'
    "{% else %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}"
    "{% elif m.role == 'tool' %}<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>{{ m.content }}<|END_TOOL_RESULT|>"
    "{% else %}{{ '<|SYSTEM_TOKEN|>' if m.role == 'system' else '<|USER_TOKEN|>' }}{{ m.content }}{% endif %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
NEMO = (
    LAST_USER + SYSTEM_FIRST + "<s>{% for m in ns.rest %}{% if m.role == 'user' %}"
    "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ ns.system ~ '\n\n' if ns.system and loop.last }}{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
ERNIE = (
    SYSTEM_FIRST + "<s>{{ ns.system ~ '\n' if ns.system }}{% for m in ns.rest %}"
    "{{ 'User: ' ~ m.content ~ '\n' if m.role == 'user' else 'Assistant: ' ~ m.content ~ '</s>' }}{% endfor %}"
    "{{ 'Assistant: ' if add_generation_prompt }}"
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
    "qwen3-coder": Family(
        QWEN_CODER,
        IM,
        ("<|im_end|>",),
        call="<tool_call>\n<function=look>\n<parameter=place>\nParis\n</parameter>\n</function>\n</tool_call>",
    ),
    "pythonic": Family(
        PYTHONIC,
        (*IM, "<|tool_call_start|>", "<|tool_call_end|>"),
        ("<|im_end|>",),
        call="<|tool_call_start|>[look(place='Paris')]<|tool_call_end|>",
    ),
    "minimax": Family(
        MINIMAX,
        ("]~b]", "[e~["),
        ("[e~[",),
        thought="Hm, {}\n</think>\n\n",
        call='\n<minimax:tool_call>\n<invoke name="look">\n<parameter name="place">Paris</parameter>\n</invoke>\n'
        "</minimax:tool_call>",
        kept=False,
    ),
    "kimi": Family(
        KIMI,
        (
            *("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"),
            *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
            *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ),
        ("<|im_end|>",),
        call="<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
        '{"place": "Paris"}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    "command": Family(
        COMMAND,
        (
            *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>"),
            *(
                "<|CHATBOT_TOKEN|>",
                "<|START_RESPONSE|>",
                "<|END_RESPONSE|>",
                "<|START_ACTION|>",
                "<|END_ACTION|>",
            ),
            *("<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
        ),
        ("<|END_OF_TURN_TOKEN|>",),
        call='<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "look", "parameters": {"place": "Paris"}}\n]'
        "<|END_ACTION|>",
        kept=False,
        answer="<|START_RESPONSE|>{}<|END_RESPONSE|>",
    ),
    "nemo": Family(NEMO, ("<s>", "</s>", "[INST]", "[/INST]"), ("</s>",), system=False),
    "phi 4": Family(PHI4, (*IM, "<|im_sep|>"), ("<|im_end|>",)),
    "ernie": Family(ERNIE, ("<s>", "</s>"), ("</s>",)),
    "granite": Family(
        GRANITE,
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        ("<|end_of_text|>",),
        call='<|tool_call|>[{"name": "look", "arguments": {"place": "Paris"}}]',
    ),
}
