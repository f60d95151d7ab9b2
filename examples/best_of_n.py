"""Best of n: samples of several questions behind one long list of examples, whose blocks all share.

    python examples/best_of_n.py [--n 8] [--model MODEL] [--examples FILE] [QUESTION ...]

Of each question it prints the answer that most samples give, and the likeliest sample, by the mean
log-probability of its tokens; at last, how few blocks all samples together held.
"""

import argparse
from collections import Counter
from pathlib import Path

from paged_kv import DEMO_MODEL, LLM, PagedKVError, SamplingParams

EXAMPLES = """
Capital of Italy? Rome / Opposite of hot? cold / Colour of snow? white / Plural of man? men
Capital of Spain? Madrid / Opposite of early? late / Colour of coal? black / Plural of foot? feet
Capital of Egypt? Cairo / Opposite of rich? poor / Colour of blood? red / Plural of box? boxes
Capital of Japan? Tokyo / Opposite of up? down / Colour of grass? green / Plural of lady? ladies
Capital of Greece? Athens / Opposite of hard? soft / Colour of the sky? blue / Plural of ox? oxen
Capital of Norway? Oslo / Opposite of old? young / Colour of gold? yellow / Plural of wife? wives
Capital of Peru? Lima / Opposite of empty? full / Colour of ash? grey / Plural of tooth? teeth
Capital of Cuba? Havana / Opposite of dark? light / Colour of milk? white / Plural of wolf? wolves
Capital of Austria? Vienna / Opposite of dry? wet / Colour of soot? black / Plural of day? days
"""
QUESTIONS = ("Capital of France?", "Opposite of big?", "Colour of lemons?", "Plural of mouse?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("questions", nargs="*", default=QUESTIONS, metavar="QUESTION")
    parser.add_argument("--n", type=int, default=8, help="samples of each question (8)")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or hub name (the demo model)")
    parser.add_argument("--examples", type=Path, help="one a line, as: question? answer")
    asked = parser.parse_args()
    text = EXAMPLES.replace(" / ", "\n") if asked.examples is None else asked.examples.read_text()
    prompts = [f"{text.strip()}\n{question}" for question in asked.questions]
    limits = {"max_tokens": 12, "stop": "\n"}
    params = SamplingParams(n=asked.n, logprobs=0, temperature=0.8, seed=0, **limits)
    with LLM(asked.model, kv_format="int4", max_num_seqs=asked.n * len(prompts)) as llm:
        alone, manager = 0, llm.engine.manager
        for question, output in zip(asked.questions, llm.generate(prompts, params), strict=True):
            votes = Counter(sample.text.strip() for sample in output.completions)
            ((winner, count),) = votes.most_common(1)
            means = [each.log_probability / len(each.token_ids) for each in output.completions]
            likeliest = output.completions[means.index(max(means))].text.strip()
            print(f"{question}  by vote, {count} of {asked.n}: {winner}")
            print(f"    likeliest, {max(means):.2f} a token: {likeliest}")
            lengths = [len(output.prompt_token_ids + each.token_ids) for each in output.completions]
            alone += sum(map(manager.max_blocks, lengths))
        print(f"{manager.pool.peak_allocated} blocks held all samples; {alone} without sharing")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, PagedKVError) as error:
        raise SystemExit(f"best_of_n.py: {error}") from error
