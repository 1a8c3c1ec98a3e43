"""Start a server with `python -m serving`, then run this."""

from serving.client import Client, make_request

with Client("localhost:50051", timeout=60) as client:
    for message in client.stream("def mean(values):", max_tokens=48, temperature=0):
        print("".join(delta.text for delta in message.sequences), end="", flush=True)
    several = [make_request(f"# {name}\n", max_tokens=16) for name in ("sort", "search")]
    for number, answer in client.generate_many(several):
        print(f"\n--- {number}: {answer}")
