"""One rank of a job, from the start to the loop: open, handshake, prepare, load, run, leave.

Every rank runs the same stages in the same order, and after each stage all ranks agree on its outcome: if one failed,
all raise the same error and leave in order. No collective operator runs before the handshake has shown that the ranks
hold shards of one artifact and agree on everything that shapes a message (a mismatch corrupts memory: measured).
Decides nothing about tokens.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

import llmrun
from llmrun import comm as communication
from llmrun import console, device, errors, failstop, faults, gpu_choice, launcher, rank_status, watchdog
from llmrun.artifact import Artifact, open_artifact
from llmrun.cores import CoreShare, cpu_quota, places_of, share_cores
from llmrun.errors import IncompatibleError
from llmrun.job_options import JobOptions
from llmrun.memory import available_bytes, expect_one_sequence, fit_blocks
from llmrun.operators import Operators
from llmrun.peers import local_peers, local_ranks
from llmrun.rank_files import RankFiles
from llmrun.step_plan import STEP_KIND, MessageKind, StepPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrun.gpu_session import GpuSession
    from llmrun.graph_check import StoredTensor
    from llmrun.rows import Rows
    from llmrun.session import RankSession

Result = TypeVar("Result")


class Job:
    """One rank's share of a running model."""

    def __init__(self, path: str | os.PathLike[str], options: JobOptions) -> None:
        """Join the job, open the artifact and shake hands; reads no weight.

        Raises:
            LlmpackError: on every rank, whichever rank failed.
        """
        deadline_s = watchdog.deadline_from_environment()
        self.options = options
        launcher.forget_lost_launcher()
        with watchdog.joining(deadline_s):
            self.comm = communication.connect()
        self.rank, self.size = self.comm.rank, self.comm.size
        if others := local_peers(self.comm.peers, self.rank):
            failstop.take_along(lambda: others)
            watchdog.watch_the_end(self.rank, self.comm.peers, deadline_s)
        self.is_broken = False  # a step failed midway: other ranks may be inside a collective
        self.is_closed = False  # the ranks have parted: nobody receives, and MPI may be gone
        self.watchdog = watchdog.Watchdog(self.rank, self.comm.peers, deadline_s)
        self.watchdog.start()
        self._ops: Operators | None = None
        self._session: RankSession | GpuSession | None = None
        self._gpu_memory: device.Memory | None = None
        self.gpu_transport, self._captures = "", True  # how values travel between GPUs; whether a step may be captured
        self.send_s = self.run_s = 0.0  # seconds that `run` has spent so far: sending plans, running them
        self.artifact, facts = self.stage("opening", lambda: self._open(path))
        self._shake_hands(facts)
        self.placement = self._place()
        is_first = local_ranks(self.comm.peers, self.rank)[0] == self.rank
        self._files = RankFiles(self.artifact, self.rank, is_first_of_host=is_first, mode=options.verify)
        self.manifest = self.artifact.manifest
        self.max_seq_len = self._max_seq_len()

    def stage(self, name: str, work: Callable[[], Result], *, is_timed: bool = True) -> Result:
        """Do `work` on every rank, and agree on the outcome.

        Args:
            name: for messages.
            work: this rank's part.
            is_timed: false if it may take for ever (a person types).
        Raises:
            LlmpackError: the first failing rank's, on every rank.
        """
        status: dict[str, Any] = {}
        result: Result | None = None
        deadline_s = self.watchdog.load_deadline if is_timed else float("inf")
        with self.watchdog.phase(name, deadline_s):
            try:
                result = work()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of a Rust library is no Exception
                console.show_traceback(error)
                where = f"rank {self.rank}: " if self.size > 1 else ""
                status = rank_status.status_of(console.as_llmpack_error(error, where))
        with self.watchdog.phase(name, deadline_s, is_done_here=True):
            statuses = self.comm.agree(status)
        for rank, other in enumerate(statuses):
            if other:
                launcher.note_exit_code(other["exit_code"])
                raise rank_status.error_of(other, rank, self.size)
        return result  # type: ignore[return-value]

    def load(self, num_blocks_wanted: int, *, is_exact: bool = False) -> None:
        """Verify this rank's files, create the session and the KV cache, and make sure that the files stayed the same.

        Args:
            num_blocks_wanted: cache blocks; all ranks get the smallest number that fits each one's memory.
            is_exact: fewer will not do.
        """
        num_blocks = self.stage("memory", lambda: self._num_blocks(num_blocks_wanted, is_exact=is_exact))
        self.num_blocks = min(s["num_blocks"] for s in self.comm.agree({"num_blocks": num_blocks}))
        self.join()
        self.stage("loading", self._load)

    def join(self) -> None:
        """Join the ranks: their communicator, shared memory, GPUs. Reads no weight."""
        if self.comm.op_communicator is not None:
            # A stage each: the second waits inside MPI, so it begins only where no rank has failed the first.
            communicator = self.comm.op_communicator
            self.stage("communicator", lambda: self.operators.set_communicator(communicator))
            self.stage("sharing memory", self.operators.share_memory)
        if self.placement.gpu is not None:
            self.stage("opening the GPU", self._open_gpu)
            if self.size > 1:
                join = self.stage("joining GPUs", lambda: device.join_gpus(self.operators.functions))
                self.gpu_transport, self._captures = join

    def run(self, plan: StepPlan) -> Rows:
        """Run a step on all ranks; rank 0 only. Returns what it says of the plan's rows."""
        self.is_broken = self.size > 1  # alone, nobody is inside a collective
        started = time.perf_counter()
        if self.size > 1:
            self.comm.send(plan.message)
        sent = time.perf_counter()
        rows = self._run(plan)
        self.run_s += time.perf_counter() - sent
        self.send_s += sent - started
        self.is_broken = False
        return rows

    def follow(self) -> tuple[MessageKind, NDArray[np.int32]]:
        """Run rank 0's steps until it sends another message, and return that; ranks other than 0 only."""
        while True:
            faults.fire(self.rank, "idle")
            message = self.comm.receive()
            if message[0] != STEP_KIND:
                return MessageKind(int(message[0])), message[1:]
            self._run(StepPlan.read(message))

    def close(self, exit_code: int = 0) -> None:
        """Leave in order, and free the session's memory: rank 0 tells the others to, with the exit code of the job."""
        self.is_closed = True
        if self.is_broken:
            self.watchdog.close()
            failstop.leave(exit_code)
        self.abandon()
        launcher.note_exit_code(exit_code)
        if self.rank == 0 and self.size > 1:
            self.comm.send(np.array([MessageKind.SHUTDOWN, exit_code], np.int32).data)

    def abandon(self) -> None:
        """Free the session's memory and end the watchdog, without a word to other ranks; no step is under way."""
        self._session = None
        if self._gpu_memory is not None:
            self._gpu_memory.close()
        self.watchdog.close()

    def verify(self, names: list[str], num_threads: int = 1) -> None:
        """Compare the digests of files with the manifest's, as the user wants it; each file once."""
        self._files.verify(names, num_threads)

    def _run(self, plan: StepPlan) -> Rows:
        session = self.session
        kind = "decode" if plan.is_decode else "prefill"
        with self.watchdog.phase(f"{kind} step", self.watchdog.step_deadline(plan.num_tokens)):
            if faults.fire(self.rank, kind):
                session.spoil_cache()
            return session.run(plan)

    def _open(self, path: str | os.PathLike[str]) -> tuple[Artifact, dict[str, Any]]:
        """Open the artifact as this rank, and collect what all ranks must agree on."""
        from llmrun import session

        whole = open_artifact(path, ranks=[])
        path = Path(path)
        if whole.manifest.shards != self.size:
            script = None if "llmrun.cli" in sys.modules else sys.argv[0] or "SCRIPT"
            message = launcher.wrong_size_message(path, whole.manifest.shards, self.size, script)
            raise IncompatibleError(message, code="E412")
        artifact = whole.with_ranks([self.rank])
        ops = self._ops = Operators()
        self.isa = ops.choose_isa(self.options.isa)
        ort = session.import_onnxruntime()
        self._ort_providers = ort.get_available_providers()
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise errors.UsageError(f"{path}: the path is not UTF-8, and ONNX Runtime opens no other.") from None
        return artifact, {
            "manifest": artifact.digest,
            "world size": self.size,
            "llmrun": llmrun.__version__,
            "onnxruntime": ort.__version__,
            "operators": ops.version,
            "kv_cache": artifact.manifest.kv_cache.dtype,
            "options": repr(self.options),
        }

    def _shake_hands(self, facts: dict[str, Any]) -> None:
        """Compare the ranks' facts; a difference is an error on every rank, and names the rank that is alone with it."""
        own = {"cores": rank_status.own_cores(), "quota": cpu_quota(), "isas": self.operators.isas}
        everyone = self.comm.agree({**facts, **own})
        self._share_isa([status.pop("isas") for status in everyone])
        self._affinities = [rank_status.read_cores(status.pop("cores")) for status in everyone]
        self._quotas = [status.pop("quota") for status in everyone]
        for name in facts:
            _expect_alike(name, [str(status[name]) for status in everyone])

    def _share_isa(self, isas: list[list[str]]) -> None:
        """Take the best instruction set that all ranks have where each chooses experts: last bits decide a near tie."""
        if self.options.isa is None and self.artifact.manifest.model.num_experts is not None:
            self.isa = self.operators.choose_isa(next(isa for isa in isas[0] if all(isa in other for other in isas)))

    def _place(self) -> device.Placement:
        """Decide where this rank computes; where the user leaves that open, all compute on the CPU if one has to."""
        ops, manifest = self.operators.functions, self.artifact.manifest
        what = (self.options.provider, manifest, ops, self._ort_providers)
        found = self.stage("looking for GPUs", lambda: gpu_choice.shown_gpus(*what))
        local = local_ranks(self.comm.peers, self.rank)
        everyone = self.comm.agree({"gpus": found})
        shown = [everyone[rank]["gpus"] for rank in local]
        share_gpu, number = self.options.share_gpu, local.index(self.rank)
        own = self.stage(
            "choosing a processor", lambda: gpu_choice.place(*what, local_rank=number, shown=shown, share_gpu=share_gpu)
        )
        everyone = self.comm.agree({"provider": own.provider, "why_not_gpu": rank_status.fit(own.why_not_gpu)})
        providers = [status["provider"] for status in everyone]
        if self.options.provider != "auto" or "cpu" not in providers:
            _expect_alike("provider", providers)
            return own
        reasons = {rank: status["why_not_gpu"] for rank, status in enumerate(everyone) if status["why_not_gpu"]}
        if not reasons and set(providers) != {"cpu"}:
            reasons = {providers.index("cpu"): "its onnxruntime has no provider for GPUs."}
        why = next((f"rank {rank}: {reason}" if rank else reason for rank, reason in reasons.items()), "")
        if why and self.rank == 0:
            console.say(f"llmrun: this runs on the CPU, not on a GPU. {why}")
        return device.Placement("cpu", why_not_gpu=why)

    def _max_seq_len(self) -> int:
        limit, wanted = self.manifest.max_seq_len, self.options.max_seq_len
        if wanted is not None and wanted > limit:
            raise errors.UsageError(f"--max-seq-len {wanted}: the artifact was packed for {limit} positions at most.")
        return wanted or limit

    def _num_blocks(self, wanted: int, *, is_exact: bool) -> int:
        """Return how many of the wanted cache blocks this host's free memory holds, or refuse what it does not."""
        spec = self.manifest.kv_cache
        if self.placement.gpu is not None:
            if is_exact:
                expect_one_sequence(spec, wanted, self.max_seq_len)
            least = -(-self.max_seq_len // spec.block_size)
            sizes = (wanted, least, self.options.most_tokens, self.options.max_num_seqs)
            return device.fit_blocks(self.placement, self.manifest, self.rank, *sizes, is_exact=is_exact)
        sharers = len(local_ranks(self.comm.peers, self.rank))
        free_bytes = max(0, available_bytes() // sharers - self.manifest.ranks[self.rank].weight_bytes)
        return fit_blocks(self.manifest, self.rank, free_bytes, wanted, self.max_seq_len, is_exact=is_exact)

    def _open_gpu(self) -> None:
        gpu, used = self.placement.gpu, self.placement.kernels
        assert gpu is not None
        assert used is not None
        ptx = gpu_choice.choose_kernels(gpu.chip, (name for name in self.manifest.kernels if name.startswith("ptx_")))
        if used == ptx:
            better = gpu_choice.best_target(gpu.chip)
            advice = "" if better == used else f" Pack with --targets {better} for a faster start."
            self._say_of_ptx(f"no code for {gpu.chip} in the artifact", used, advice)
        try:
            self._open_gpu_with(used)
        except device.CodeRefusedError:
            if ptx in (used, None):
                raise
            self._say_of_ptx(f"the driver is too old for the code of {used}", ptx, " Install a newer one.")
            self.placement = dataclasses.replace(self.placement, kernels=ptx)
            self._open_gpu_with(ptx)

    def _say_of_ptx(self, why: str, ptx: str, advice: str) -> None:
        if self.rank == 0:
            console.say(f"llmrun: {why}: the driver compiles its {ptx} now.{advice}")

    def _open_gpu_with(self, kernels: str) -> None:
        name = self.manifest.kernels[kernels]
        self.verify([name])
        path = os.fsencode(self.artifact.resolve(name))
        most = (self.options.max_num_seqs, self.options.most_tokens)
        device.open_gpu(self.operators.functions, self.placement, path, *most, user=self.watchdog)

    def _load(self) -> None:
        from llmrun import graph_check

        faults.fire(self.rank, "load")
        names = self._files.names
        entry = self.manifest.ranks[self.rank]
        self.verify([name for name in names if name != entry.weights])
        graph = self.artifact.resolve(entry.graphs[self.placement.graph])
        weights = self.artifact.resolve(entry.weights)
        stored = graph_check.check_graph(graph, weights, self.rank, self.size, self.manifest.ops["version"])
        share = self._pin()
        # The weights are mapped, not parsed: their digests may be computed while the session is made. All ranks wait for
        # each other at the end of this stage, so that nothing runs before every digest is known to be right.
        with self._files.verifying([entry.weights], share.num_threads):
            self._session = self._make_session(graph, weights, stored, share)
        self.watchdog.count_collectives(self.operators.collective_state)
        self._files.conclude()

    def _make_session(
        self, graph: Path, weights: Path, stored: list[StoredTensor], share: CoreShare
    ) -> RankSession | GpuSession:
        from llmrun import gpu_session, session

        if self.placement.gpu is not None:
            self._gpu_memory = device.Memory(self.operators.functions)
            return gpu_session.GpuSession(
                graph,
                self.operators.path,
                self.manifest.kv_cache,
                self.placement,
                self._gpu_memory,
                num_blocks=self.num_blocks,
                vocab_size=self.manifest.model.vocab_size,
                max_seq_len=self.max_seq_len,
                max_rows=self.options.most_tokens,
                gather=self.comm.gather,
                size=self.size,
                captures=self._captures,
            )
        with self.operators.running_on(share):
            return session.RankSession(
                graph,
                weights,
                stored,
                self.operators.path,
                self.manifest.kv_cache,
                num_blocks=self.num_blocks,
                vocab_size=self.manifest.model.vocab_size,
            )

    def _pin(self) -> CoreShare:
        """Keep this process to its share of the host's cores."""
        ranks = local_ranks(self.comm.peers, self.rank)
        quota = min((q for r in ranks if (q := self._quotas[r]) is not None), default=None)
        affinities = [self._affinities[r] for r in ranks]
        places = places_of(self._affinities[self.rank])
        share = share_cores(affinities, ranks.index(self.rank), self.options.threads, quota, places)
        if share.cores and self.size > 1:
            os.sched_setaffinity(0, share.cores)
        self.num_threads = share.num_threads
        return share

    @property
    def operators(self) -> Operators:
        """The operator library."""
        assert self._ops is not None
        return self._ops

    @property
    def session(self) -> RankSession | GpuSession:
        """The loaded graph.

        Raises:
            UsageError: the job was closed.
        """
        if self._session is None:
            raise errors.UsageError("the engine is closed. Open another one.")
        return self._session


def _expect_alike(name: str, values: list[str]) -> None:
    """Raise IncompatibleError for the rank that is alone with its value."""
    common = max(values, key=values.count)
    for rank, value in enumerate(values):
        if value != common:
            raise IncompatibleError(
                f"rank {rank} disagrees with rank {values.index(common)} about {name}: found {value},"
                f" expected {common}. All ranks need the same artifact, software and options.",
                code="E413",
            )
