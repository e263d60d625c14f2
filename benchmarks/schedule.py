"""A run of ``upscale --ray`` over ten million pictures on 64 GPUs, on paper: where the time goes, and what breaks first.

    python benchmarks/schedule.py --pictures 10000000 --gpus 64

The network's time is arithmetic. Blocks, workers that are lost and pictures of unequal size are simulated, seeded. The numbers given are assumptions, to be replaced by your own.
"""

import argparse
import heapq
import random

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pictures", type=float, default=1e7)
parser.add_argument("--gpus", type=int, default=64)
parser.add_argument("--seconds", type=float, default=0.2, help="of a GPU for a picture, on average; they vary by a factor of two up and down")
parser.add_argument("--start", type=float, default=60, help="seconds until a worker has its networks")
parser.add_argument("--header", type=float, default=0.02, help="seconds for a header from the store, of which 32 are read at once")
parser.add_argument("--block", type=int, default=16, help="pictures of a block")
parser.add_argument("--call", type=float, default=0.003, help="seconds of the driver for a block")
parser.add_argument("--store", type=float, default=0.15, help="seconds to fetch a block's first picture and to put its last, which nothing hides")
parser.add_argument("--read", type=float, default=0.3, help="MB of a source")
parser.add_argument("--write", type=float, default=0.6, help="MB of a result")
parser.add_argument("--lost", type=float, default=0.02, help="workers that are lost in an hour, as a share of all")
a = parser.parse_args()

draw = random.Random(1)
blocks = -(-int(a.pictures) // a.block)
mean = (2 - 0.5) / (2 * 0.6931)  # of 2**u, u uniform in [-1, 1]
free = [(a.start, worker) for worker in range(a.gpus)]  # when each worker asks for its next block
heapq.heapify(free)
driver, begun = 1024 * a.header / 32, 0
spent = dict.fromkeys(("work", "store", "wait", "again", "start"), 0.0)
lost, again, end = 0, 0, 0.0
while begun < blocks or again:
    at, worker = heapq.heappop(free)
    driver = max(driver, at) + a.call
    spent["wait"] += driver - at
    work = sum(a.seconds * 2 ** draw.uniform(-1, 1) / mean for _ in range(a.block))
    seconds = work + a.store
    if again:
        again -= 1
    else:
        begun += 1
    if draw.random() < a.lost * seconds / 3600:
        until = draw.uniform(0, seconds)
        lost, again = lost + 1, again + 1
        spent["again"] += until
        spent["start"] += a.start
        heapq.heappush(free, (driver + until + a.start, worker))
        continue
    spent["work"] += work
    spent["store"] += a.store
    end = max(end, driver + seconds)
    heapq.heappush(free, (driver + seconds, worker))
whole = end * a.gpus
spent["start"] += a.start * a.gpus
rest = whole - sum(spent.values())
rate = a.pictures / end
print("| of all GPUs' time | hours | share |\n|---|---|---|")
for name, seconds in (
    ("the networks", spent["work"]),
    ("the first fetch and the last put of each block", spent["store"]),
    ("waiting for the driver", spent["wait"]),
    (f"starts, of {a.gpus} workers and {lost} in the place of lost ones", spent["start"]),
    ("lost blocks' work", spent["again"]),
    ("the end, when others still work", rest),
):
    print(f"| {name} | {seconds / 3600:.2f} | {seconds / whole:.2%} |")
print(f"| all, {end / 3600:.2f} h by the clock | {whole / 3600:.1f} | |\n")
print("| limit | used | at |\n|---|---|---|")
print(f"| headers read by the driver | {rate:.0f} a second | {32 / a.header:.0f} |")
print(f"| blocks handed out by the driver | {rate / a.block:.0f} a second | {1 / a.call:.0f} |")
print(f"| the store, MB a second read and written | {rate * a.read:.0f}, {rate * a.write:.0f} | the network's |")
print(f"| writes to one prefix of S3 | {rate:.0f} a second | 3500 |")
print(f"| manifest | {a.pictures * 8 / 1e6:.0f} MB in {end / 10:.0f} files | read at each start |")
