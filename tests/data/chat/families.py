"""Chat templates of published families, written from their documented formats, without markers.

Each writes what the family's documentation shows for the messages that the tests use: several
turns, reasoning, tools. They differ in what makes masks hard: what they leave out of earlier
turns, what they add, and where the generation prompt ends.
"""

# <|im_start|>role, reasoning in <think>, left out before the last question; the last answer without
# reasoning gets an empty block. Tools are listed in the system turn.
QWEN3 = """\
{%- set last = namespace(question=0) -%}
{%- for m in messages if m.role == 'user' -%}
{%- set last.question = messages.index(m) -%}
{%- endfor -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content ~ '\\n\\n' -}}{%- endif -%}
{{- '# Tools\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' ~ (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{- '<|im_start|>user\\n' ~ m.content ~ '<|im_end|>\\n' -}}
{%- elif m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > last.question and (loop.last or m.reasoning_content) -%}
{{- '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content or '' -}}
{%- for call in m.tool_calls or [] -%}
{%- if m.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
{{- (call.function.arguments | tojson) ~ '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response><|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""

# Headers; the date in the system turn; tools in the first question; calls as JSON; results as
# ipython.
LLAMA31 = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{%- if tools -%}{{- 'Environment: ipython\\n' -}}{%- endif -%}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' -}}
{{- system ~ '<|eot_id|>' -}}
{%- for m in messages -%}
{%- if m.tool_calls -%}
{%- set call = m.tool_calls[0].function -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}<|eot_id|>' -}}
{%- elif m.role == 'tool' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ (m.content | tojson) ~ '<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' -}}
{%- if tools and loop.first -%}
{%- for tool in tools -%}{{- (tool | tojson(indent=4)) ~ '\\n\\n' -}}{%- endfor -%}
{%- endif -%}
{{- (m.content | trim) ~ '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# The assistant is called model, and there is no system turn.
GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{- raise_exception('System role not supported') -}}
{%- endif -%}
{%- for m in messages -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{- '<start_of_turn>' ~ role ~ '\\n' ~ (m.content | trim) ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# No generation prompt; the system text and the tools go before the last question.
MISTRAL = """\
{%- set last = namespace(question=0) -%}
{%- for m in messages if m.role == 'user' -%}
{%- set last.question = messages.index(m) -%}
{%- endfor -%}
{{- bos_token -}}
{%- for m in messages if m.role != 'system' -%}
{%- if m.role == 'user' -%}
{%- if messages.index(m) == last.question -%}
{%- if tools -%}{{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{{- '[INST] ' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content ~ '\\n\\n' -}}{%- endif -%}
{%- else -%}{{- '[INST] ' -}}{%- endif -%}
{{- m.content ~ '[/INST]' -}}
{%- elif m.tool_calls -%}
{{- '[TOOL_CALLS] [' -}}
{%- for call in m.tool_calls -%}{{- call.function | tojson -}}{%- endfor -%}
{{- ']' ~ eos_token -}}
{%- elif m.role == 'assistant' -%}
{{- ' ' ~ (m.content | trim) ~ eos_token -}}
{%- elif m.role == 'tool' -%}
{{- '[TOOL_RESULTS] {"content": ' ~ (m.content | tojson) ~ '}[/TOOL_RESULTS]' -}}
{%- endif -%}
{%- endfor -%}
"""

# No header before a question's text but a token; answers end with EOS. R1 opens the reasoning in
# its generation prompt, and leaves it out of all answers.
DEEPSEEK_V3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content -}}
{%- elif m.role == 'user' -%}{{- '<｜User｜>' ~ m.content -}}
{%- elif m.role == 'assistant' -%}{{- '<｜Assistant｜>' ~ m.content ~ eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""
DEEPSEEK_R1 = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content -}}
{%- elif m.role == 'user' -%}{{- '<｜User｜>' ~ m.content -}}
{%- elif m.role == 'assistant' -%}
{{- '<｜Assistant｜>' ~ m.content.split('</think>')[-1] ~ eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
"""

# Answers are sampled with the name of a channel; the call of a tool has a header of its own.
GPT_OSS = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.tool_calls -%}
{{- '<|start|>assistant to=' ~ m.tool_calls[0].function.name ~ '<|message|>' -}}
{{- (m.tool_calls[0].function.arguments | tojson) ~ '<|call|>' -}}
{%- else -%}
{%- if m.reasoning_content -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' ~ m.reasoning_content ~ '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' ~ m.content -}}
{{- '<|return|>' if loop.last else '<|end|>' -}}
{%- endif -%}
{%- else -%}
{{- '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""

# The text ends with EOS, which comes after the token that ends a turn.
PHI3 = """\
{%- for m in messages -%}
{{- '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""
