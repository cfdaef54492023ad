# The commands of the book. `make` alone lists them; the first one that needs it sets up .venv.
.DEFAULT_GOAL := help
.PHONY: help book test test-slow check-pages notebooks student slides lint bench paper offline pdf lab serve clean vendor reveal axe

PY    := .venv/bin/python
STAMP := .venv/.stamp
BROWSER := .venv/.stamp-browser
JOBS  ?= auto
PORT  ?= 8000
# The first interpreter that is new enough; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Kernels and test workers run side by side, so each gets one thread.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

# Commands that use the book do not build it.
BUILT := test -e _build/.complete || { echo "There is no book yet: run make book first."; exit 1; }

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up .venv: a few minutes and 1.6 GB (more where torch comes with CUDA)."
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or run: make PYTHON=/path/to/python"; exit 1; }
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(BROWSER): $(STAMP)
	@echo "Adding to .venv what drives a browser and binds a PDF: 170 MB."
	.venv/bin/pip install --quiet -c constraints.txt -e '.[browser]'
	@touch $@

book: $(STAMP) notebooks vendor  ## execute what is stale and build the book into _build/html
	@echo "Executing the chapters that changed, then building the book."
	$(PY) book/tools/contract.py
	$(PY) book/tools/execute.py
	$(PY) book/tools/harvest.py
	$(PY) book/tools/speed.py
	$(PY) book/tools/explore.py
	$(PY) book/tools/course.py
	@# Sphinx reads a page again only if its text changed: after a build with warnings, or when styles, scripts or the code
	@# that makes pages have changed, it starts afresh.
	@test -e _build/.complete && test -z "$$(find book/ext book/_static book/_templates -newer _build/.complete)" || rm -rf _build/.doctrees
	@rm -f _build/.complete
	.venv/bin/jupyter-book build . -W -n --keep-going
	@touch _build/.complete
	@echo "The book is at $(CURDIR)/_build/html/index.html"

test: $(STAMP) $(if $(CI),,notebooks)  ## run the unit tests with coverage, then every notebook
	@echo "Running the unit tests, then all notebooks cell by cell."
	$(PY) -m pytest tests -m "not slow" -n $(JOBS) --dist loadfile --cov icl_lib --cov-report term-missing:skip-covered
	$(PY) -m pytest notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout 600 -n $(JOBS) --dist loadfile

test-slow: $(STAMP)  ## run the tests that take long: kills, workers, a small Dask cluster
	@echo "Running the slow tests."
	$(PY) -m pytest tests -m slow -n $(JOBS) --dist loadfile

check-pages: $(BROWSER) axe  ## check every page of the built book in Chromium: phone and desk, light and dark
	@echo "Reading every page of _build/html in Chromium; pictures of those with problems go into _build/screenshots."
	@$(BUILT)
	$(PY) -m pytest tests/browser -n $(JOBS)

notebooks: $(STAMP)  ## write notebooks/*.ipynb from notebooks/*.md
	@echo "Writing the notebooks from their Markdown sources."
	$(PY) book/tools/notebooks.py

student: $(STAMP)  ## write the notebooks without solutions into _build/student
	@echo "Writing the student edition."
	$(PY) book/tools/student.py

slides: $(STAMP) vendor reveal  ## write the slides of two lectures into _build/slides
	@echo "Executing the chapters that changed, then writing the slides."
	$(PY) book/tools/execute.py
	$(PY) book/tools/slides.py

lint: $(STAMP)  ## check the style and the types of the code
	@echo "Checking style and types, and that every notebook is in step with its source."
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(PY) book/tools/notebooks.py --check

bench: $(STAMP)  ## compare speed and memory with the straightforward way (minutes)
	@echo "Running the benchmarks; the cost against d is another program, benchmarks/scaling.py."
	$(PY) benchmarks/run.py

paper: export ICL_SCALE := paper
paper: $(STAMP)  ## build the book with every chapter at the papers' sizes (hours on a CPU; a GPU helps)
	@echo "Running the full-size experiments (an interrupted run resumes), then every chapter at the papers' sizes."
	$(PY) book/tools/full_size.py
	$(PY) book/tools/full_size_transformers.py
	$(MAKE) book

offline: $(STAMP)  ## pack the built book into a zip file that needs neither a network nor a server
	@echo "Packing _build/html, with MathJax inside."
	@$(BUILT)
	$(PY) book/tools/offline.py

pdf: $(BROWSER)  ## print the built book into one PDF, with Chromium
	@echo "Printing every page of _build/html; a few minutes."
	@$(BUILT)
	$(PY) book/tools/pdf.py

lab: $(STAMP) notebooks  ## open the notebooks in JupyterLab, to run and change them
	@echo "Opening notebooks/ in JupyterLab; stop with Ctrl-C."
	@test -x .venv/bin/jupyter-lab || .venv/bin/pip install --quiet -c constraints.txt -e '.[lab]'
	.venv/bin/jupyter-lab notebooks

serve: $(STAMP)  ## show the built book at http://localhost:8000 (PORT=... for another port)
	@echo "Serving _build/html at http://localhost:$(PORT); stop with Ctrl-C."
	@$(BUILT)
	$(PY) -m http.server --bind localhost --directory _build/html $(PORT)

clean:  ## remove everything that was built, but keep .venv and _vendor
	@echo "Removing what was built."
	rm -rf _build book/*-rows.md book/welcome.png book/speed.png book/explore-*.png book/_static/explore-*.js \
		.coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache

# Scripts that lie beside the pages, so that the book can be read offline. Without npm or a network MathJax comes from its
# usual CDN, and links have no previews.
# $(call fetch,folder,npm package,its archive,files in it,what happens without it)
define fetch
	@test -d _vendor/$(1) || { mkdir -p _vendor && cd _vendor \
		&& npm pack --silent --fetch-retries=0 $(2) >/dev/null 2>&1 \
		&& tar xzf $(3) $(addprefix package/,$(4)) && mv package $(1) && rm $(3); } \
		|| echo "npm could not fetch $(2), so $(5)."
endef

# Only what the components of MathJax that the book and the slides use can load is kept.
MATHJAX := es5/tex-mml-chtml.js es5/tex-svg.js es5/input/tex es5/a11y es5/sre es5/ui es5/output/chtml/fonts

vendor:
	$(call fetch,mathjax,mathjax@3.2.2,mathjax-3.2.2.tgz,$(MATHJAX) LICENSE,the pages will load it from its CDN)
	$(call fetch,popper,@popperjs/core@2.11.8,popperjs-core-2.11.8.tgz,dist/umd/popper.min.js LICENSE.md,links have no previews)
	$(call fetch,tippy.js,tippy.js@6.3.7,tippy.js-6.3.7.tgz,dist/tippy-bundle.umd.min.js LICENSE,links have no previews)

# The same for the slides.
reveal:
	$(call fetch,reveal.js,reveal.js@5.2.1,reveal.js-5.2.1.tgz,dist plugin/notes LICENSE,the slides will load it from a CDN)

# What `make check-pages` asks about accessibility; it is no part of the book.
axe:
	$(call fetch,axe-core,axe-core@4.14.1,axe-core-4.14.1.tgz,axe.min.js LICENSE,make check-pages cannot ask about accessibility)
	@test -d _vendor/axe-core
