# Each target is one line that can as well be typed; .ci/run needs no make.
.PHONY: all help test race fuzz bench peers relays speed cutpath soak storm sockets browser cuts kills cluster mutants api cover lint quickstart ci

MODULES  := $(sort $(dir $(shell find . -name go.mod -not -path './.*' -not -path './tools/lint/*')))
FUZZTIME ?= 30s
in_each   = @for m in $(MODULES); do echo "$$m: $(1)"; (cd $$m && $(1)) || exit 1; done

all: lint test ## lint and test: the default

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

test: ## tests of every module
	$(call in_each,go test ./...)

race: ## the same under the race detector, as CI does
	$(call in_each,go test -race ./...)

fuzz: ## FUZZTIME (30s) of each fuzz target of the root module
	@go test -list '^Fuzz' ./... | awk '/^Fuzz/ {n[++k]=$$1} $$1=="ok" {for (i=1;i<=k;i++) print $$2, n[i]; k=0}' | while read p f; do echo "$$p $$f"; go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$p </dev/null || exit 1; done

bench: ## benchmarks: time, round trips and allocations for each message
	go test -run '^$$' -bench . -benchmem ./...

peers: ## the same work by other SMTP clients, side by side: BENCHMARKS.md
	cd bench && go run . -quick

relays: ## the client against real relays that this machine can install
	cd relays && go run .

speed: ## a lone sender beside net/smtp, on Postfix and Haraka
	cd relays && go run . -speed -only postfix,haraka

cutpath: ## a path that is really cut, in network namespaces; wants root and iproute2
	go test -tags cutpath -v ./internal/test/cutpath

soak: ## five million messages over loopback, one in a hundred failing
	go test -run '^TestSoak$$' -v -timeout 3h ./test -soak.messages=5000000

storm: ## a hundred thousand storms from random seeds
	go test -run '^TestStorm$$' -v -timeout 3h ./internal/test/storm -storm.seeds=100000 -storm.from=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')

sockets: ## a million messages over real connections that break, and contexts that end at any moment of a body's way
	go test -v -timeout 4h ./internal/test/sockets -sockets.sends=1000000 -sockets.cancels=50000

browser: ## the page of smtprelay serve in Chromium: attack mails, the keyboard, a phone; wants apt-get install chromium
	cd cmd/smtprelay && go test -count=1 -tags browser -v ./internal/devrelay

cuts: ## every dialogue with the connection cut after every octet: minutes
	go test ./internal/test/dialogue -run CutAnywhere -cut-every=1 -timeout 60m

kills: ## workers of each store of the outbox, killed a thousand times in each way of writing intents: hours
	cd outbox/sqlitestore && go test -run Killed -v -timeout 3h . -kills=1000
	cd outbox/natsstore && for i in 1 2 3 4 5 6 7 8 9 10; do go test -count=1 -run Killed -v -timeout 6h . -kills=100 || exit 1; done

cluster: ## a NATS cluster and workers of the outbox, killed, paused and cut off, in network namespaces: an hour; wants root and iproute2
	cd outbox/natsstore && go test -tags cluster -run '^$$' .
	cd outbox/natsstore && unshare -n sh -c 'ip link set lo up && go test -tags cluster -run WhileServersAndWorkersFail -v -timeout 3h . -cluster.messages=200000 -cluster.time=1h'

mutants: ## break the client on purpose, one line at a time, and see that the tests notice
	go run ./tools/mutants

api: ## write down the exported interface, which .ci/run compares
	go run ./tools/api >tools/api/api.txt

cover: ## coverage of the root module, as a page in the browser
	go test -coverpkg=./... -coverprofile=cover.prof ./... && go tool cover -html=cover.prof

lint: ## gofmt, go vet and staticcheck of every module; golangci-lint of the root (minutes, the first time)
	@test -z "$$(find . -name '*.go' -not -path './.*' -exec gofmt -l {} + | tee /dev/stderr)"
	$(call in_each,go vet ./...)
	$(call in_each,go tool staticcheck ./...)
	"$$(cd tools/lint && GOWORK=off go tool -n golangci-lint)" run ./...

quickstart: ## 1,000 messages to a fake relay, measured
	go run ./examples/quickstart

ci: ## everything that must hold before a change lands
	bash .ci/run
