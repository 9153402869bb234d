"""What the tests of reward sources share: answers made of texts, reward models on disk, an endpoint with a script."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from alignkit.algo.batching import pad_left, pad_right
from alignkit.algo.types import Rollout
from alignkit.models.tokenizer import learn_tokenizer
from alignkit.reward.function import Function
from alignkit.reward.http import Http
from alignkit.reward.source import Answers
from alignkit.stages.scoring import reward_scores

PROMPTS = [
    "the harbour",
    [{"role": "user", "content": "a small lamp"}],
    "three letters",
    [{"role": "system", "content": "be quiet"}, {"role": "user", "content": "why?"}],
    "stones on a beach",
]
RESPONSES = [" was quiet", "in every window", " and sent none", "the storm came", " in the west, before"]
FINISHED = [True, True, False, False, True]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}: {{ m['content'] }}]{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant: {% endif %}"
)


def answers_of(encoder, prompts=PROMPTS, responses=RESPONSES, finished=FINISHED) -> Answers:
    """Texts as a rollout of these very texts, one without its end token where it is not finished."""
    ids = [encoder.response(*row) if done else encoder.response(*row)[:-1]
           for *row, done in zip(prompts, responses, finished)]  # fmt: skip
    before, before_mask = pad_left([encoder.prompt(prompt) for prompt in prompts], 0)
    after, after_mask = pad_right(ids, 0)
    tokens, mask = torch.cat([before, after], dim=1), torch.cat([before_mask, after_mask], dim=1)
    return Answers(
        Rollout(tokens, mask, after_mask, torch.tensor(finished), torch.zeros(after_mask.shape)),
        list(prompts),
        list(responses),
    )


def scored(source, answers, cluster, out, microbatch=20, name="reward"):
    """Scores of these answers as PPO gets them, and the share that failed."""
    hand = cluster.deal(answers.rollout.mask.sum(dim=1))
    order = hand.rows.tolist()
    mine = Answers(
        answers.rollout.take(hand.rows), [answers.prompts[i] for i in order], [answers.responses[i] for i in order]
    )
    with torch.no_grad():
        return reward_scores(source, mine, hand, cluster, microbatch, out, name)


def save_reward_model(folder, tokenizer, seed=0, metrics=None, **changes):
    """A random one-output Llama with its tokenizer; with `metrics` as the product of a finished stage."""
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **changes,
    )  # fmt: skip
    torch.manual_seed(seed)
    place = folder if metrics is None else folder / "model"
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    if metrics is not None:
        manifest = {"stage": "reward_model", "digest": f"{seed:012d}", "files": {}, "metrics": metrics}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return model


def other_tokenizer(template=TEMPLATE):
    """Other tokens than those of `tiny_tokenizer`, and another chat template."""
    tokenizer = learn_tokenizer(["bright birds build big bowers", "be brief, be bold"], 270)
    tokenizer.chat_template = template
    return tokenizer


class Endpoint:
    """An HTTP server on a free port that answers as its script says, in order, the last for ever: each entry a status
    and a body, or a function of the request that gives both. requests: what it was sent; headers: with what."""

    def __init__(self, *script):
        self.script, self.requests, self.headers, lock = list(script), [], [], threading.Lock()
        world = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    world.requests.append(request)
                    world.headers.append(dict(self.headers))
                    step = world.script.pop(0) if len(world.script) > 1 else world.script[0]
                status, body = step(request) if callable(step) else step
                self.send_response(status)
                if status in (301, 302, 307):
                    self.send_header("Location", world.url + "elsewhere")
                self.end_headers()
                try:
                    for part in [body] if isinstance(body, str) else body:
                        self.wfile.write(part.encode())
                        self.wfile.flush()
                except OSError:  # who asked has gone
                    pass

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=lambda: self.server.serve_forever(poll_interval=0.02), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def lengths(request):
    """The right answer: the length of each response."""
    return 200, json.dumps({"scores": [len(response) for response in request["responses"]]})


def function(named: str, batch=64, timeout=5.0, on_failure="stop"):
    return Function(function=named, batch=batch, timeout=timeout, on_failure=on_failure)


def http(url: str, **changes) -> Http:
    usual = {"batch": 2, "concurrency": 2, "timeout": 5.0, "retries": 2, "backoff": 0.01, "on_failure": "stop"}
    return Http(url=url, **{**usual, "token_env": None, **changes})
