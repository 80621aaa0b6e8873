"""Builds stacked_lstm_ext._C. Decisions that do not need torch are in build_support.py, metadata in pyproject.toml."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a PEP 517 front end does not put the project's folder on the path

import build_support as support  # noqa: E402

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"stacked_lstm_ext: setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77.0.3'")

try:
    import torch
    from torch.utils import cpp_extension

    NO_TORCH = ""
    # torch's other way to compile needs ninja, which a machine without a network may lack; see compile_on_all_cores.
    BuildExtension = cpp_extension.BuildExtension.with_options(use_ninja=False)
except ImportError as error:  # an sdist needs no torch; for a build, BuildStackedLSTM.run says what to do
    from setuptools.command.build_ext import build_ext as BuildExtension

    NO_TORCH = str(error)


class BuildStackedLSTM(BuildExtension):
    """torch's BuildExtension, with the CUDA decision, our flags and the link order."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if getattr(self, "editable_mode", False) and not NO_TORCH:
            # `pip install -e` would compile everything in a temporary folder, every time. In this folder, a build finds the
            # objects of the last one and compiles only what has changed.
            tag = f"editable-{sys.implementation.cache_tag}-torch-{torch.__version__}"
            self.build_temp = str(ROOT / "build" / tag)
        self.recompile = bool(self.force)  # --force
        self.force = True  # otherwise setuptools decides: everything or nothing

    def run(self) -> None:
        if sys.platform == "win32":
            sys.exit("stacked_lstm_ext: Windows is not supported")
        if NO_TORCH:
            sys.exit(
                f"stacked_lstm_ext: the extension is compiled against the torch it will run with, and there is none "
                f"here ({NO_TORCH}). Install torch first, then: pip install --no-build-isolation ."
            )
        super().run()

    def build_extensions(self) -> None:
        try:
            self._configure(self.extensions[0])
        except support.BuildError as error:
            sys.exit(f"stacked_lstm_ext: error: {error}")
        compiler = self.compiler
        # Use the compiler that torch checks and compiles with. setuptools would use the one that built Python. The flags with
        # which Python's extensions are compiled are kept.
        flags = list(itertools.dropwhile(lambda word: not word.startswith("-"), compiler.compiler_so))
        for which in ("compiler_so", "compiler_so_cxx"):
            compiler.set_executable(which, [*cpp_extension.get_cxx_compiler().split(), *flags])
        compile_in_turn, link = compiler.compile, compiler.link_shared_object

        def compile_on_all_cores(sources, *args, **kwargs):  # type: ignore[no-untyped-def]
            """Let torch and setuptools make the command of each source, note the commands, then run them side by side."""
            commands: list[tuple[str, ...]] = []
            runs = "call" if hasattr(compiler, "call") else "spawn"  # setuptools' method that runs a command, new and old
            setattr(compiler, runs, lambda command, **_: commands.append(tuple(map(str, command))))
            try:
                objects = compile_in_turn(sources, *args, **kwargs)
            finally:
                delattr(compiler, runs)
            todo = [support.Compilation(*one) for one in zip(sources, map(Path, objects), commands, strict=True)]
            try:
                if self.recompile:
                    for one in todo:
                        one.record.unlink(missing_ok=True)
                support.compile_all(todo, support.jobs(os.environ), lambda text: print(text, flush=True))
            except support.BuildError as error:
                sys.exit(f"stacked_lstm_ext: error: {error}")
            return objects

        def link_in_order(objects, *args, **kwargs):  # type: ignore[no-untyped-def]  # setuptools sorts by name
            return link(support.link_order(objects), *args, **kwargs)

        compiler.compile, compiler.link_shared_object = compile_on_all_cores, link_in_order
        super().build_extensions()

    def _configure(self, extension: setuptools.Extension) -> None:
        support.require_torch(torch.__version__)
        macros = support.compiler_macros(cpp_extension.get_cxx_compiler())
        werror = bool(support.switched_on(os.environ, "STACKED_LSTM_EXT_WERROR"))
        version = self.distribution.get_version()
        cu_files = support.cuda_sources(ROOT)
        has_gpus = torch.version.cuda is not None and torch.cuda.is_available()
        capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count() if has_gpus else 0)]
        plan = support.plan_cuda(
            environ=os.environ,
            torch_version=torch.__version__,
            torch_cuda=torch.version.cuda,
            visible_archs=[f"{major}.{minor}" for major, minor in capabilities],
            sources=cu_files,
        )

        includes = cpp_extension.include_paths()
        openmp, remark = support.openmp_flags(sys.platform, macros, Path(includes[0]))
        extension.define_macros += [("STACKED_LSTM_EXT_VERSION", f'"{version}"'), ("NDEBUG", None)]
        if support.switched_on(os.environ, "STACKED_LSTM_EXT_WATCHDOG"):
            extension.define_macros.append(("STACKED_LSTM_WATCHDOG", None))
        extension.library_dirs += cpp_extension.library_paths()
        extension.libraries += ["c10", "torch", "torch_cpu", "torch_python"]
        nvcc_flags: list[str] = []

        if plan.nvcc is None:
            support.say(f"building version {version}, the CPU part only: {plan.why_not}" + (f"; {remark}" * bool(remark)))
        else:
            support.say(
                f"building version {version} with CUDA {plan.nvcc.release} ({plan.nvcc.path}) for {plan.archs}"
                + (f"; {remark}" * bool(remark))
            )
            # BuildExtension reads the toolkit's folder and the architectures from these two variables.
            cpp_extension.CUDA_HOME = str(plan.nvcc.home)
            os.environ["TORCH_CUDA_ARCH_LIST"] = plan.archs
            folders, arguments = support.cudart_link_args(plan.nvcc.home, plan.nvcc.release.split(".")[0])
            extension.sources += cu_files
            extension.define_macros += [
                ("STACKED_LSTM_EXT_CUDA_VERSION", f'"{plan.nvcc.release}"'),
                ("STACKED_LSTM_EXT_CUDA_ARCHS", f'"{plan.archs}"'),
            ]
            extension.library_dirs += folders
            extension.libraries += ["c10_cuda", "torch_cuda"]
            extension.extra_link_args += arguments
            includes += [str(path) for path in support.cuda_includes(plan.nvcc)]
            nvcc_flags = support.nvcc_flags(werror)
        extension.extra_compile_args = {"cxx": support.cxx_flags(openmp, includes, werror), "nvcc": nvcc_flags}


setuptools.setup(
    ext_modules=[
        setuptools.Extension(
            "stacked_lstm_ext._C",
            sources=support.cpp_sources(ROOT),
            depends=support.headers(ROOT),
            include_dirs=[str(ROOT / "csrc")],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildStackedLSTM},
)
