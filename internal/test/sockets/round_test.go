package sockets

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A round: one relay, one client, several concurrent callers. How a round is drawn from a seed, run, and judged.

// round is the plan of a round.
type round struct {
	setup
	limits     smtprelay.Limits
	inFlight   int
	retry      smtprelay.Retry
	pipelining smtprelay.Pipelining
	calm       bool // nothing goes wrong: everything is accepted except what the relay refuses
	senders    [][]*message
	password   string                         // for AUTH; "" means none
	told       func(led *ledger, all []*told) // further checks besides the judge's, if not nil
}

// drawRound draws a round against a kind of relay. The numbers of its messages begin at first.
func drawRound(seed uint64, kind relayMake, chunking bool, first int) *round {
	rng := rand.New(rand.NewPCG(seed, 0))
	one := func(in int) bool { return rng.IntN(in) == 0 }
	r := &round{setup: setup{kind: kind, chunking: chunking}}
	r.calm = one(8)
	r.maxConns = []int{1, 2, 8, 8, 8, 8}[rng.IntN(6)]
	r.limits.MaxMessagesPerConn = []int{0, 0, -1, 7}[rng.IntN(4)]
	r.inFlight = []int{0, 0, 1, 16}[rng.IntN(4)]
	r.pipelining = []smtprelay.Pipelining{0, 0, 0, smtprelay.PipelineWithin, smtprelay.PipelineOff}[rng.IntN(5)]
	r.retry = smtprelay.Retry{MaxAttempts: []int{0, 1, 1, 8}[rng.IntN(4)]}
	r.habits = habits{takesCutChunk: !one(3), readsRefusedChunks: one(3), noSize: one(4), noChunking: one(10)}
	if r.proxied = one(2); r.proxied {
		r.weather = weather{seed: rng.Uint64(), breaks: 15 + rng.IntN(60), holds: 10}
	}
	if one(5) {
		r.behind = []smtptest.Habit{smtptest.HabitRefuse, smtptest.HabitDiscard}[rng.IntN(2)]
		r.dotDelay = time.Duration(rng.IntN(2000)) * time.Microsecond
	}
	if one(3) {
		r.fault = drawFault(rng, chunking)
	}
	// A chunked body sent with its envelope, after another message's end, is gone before the result of RSET is known.
	together := chunking && r.pipelining == smtprelay.PipelineAuto
	if together && r.fault.At == smtptest.Rset {
		r.fault.At = smtptest.Mail
	}
	r.habits.keepsEnvelope = !together && one(6)
	if r.calm {
		r.weather.breaks, r.habits.keepsEnvelope = 0, false
	}
	if r.calm || !kind.isFake() {
		r.behind, r.fault = smtptest.HabitNone, smtptest.Fault{}
	}
	hurry := []time.Duration{500 * time.Microsecond, 1500 * time.Microsecond, 1500 * time.Microsecond, 10 * time.Millisecond}[rng.IntN(4)]
	for range 1 + rng.IntN(2*r.maxConns) {
		var ms []*message
		for range 20 {
			ms = append(ms, drawMessage(rng, first, r.calm, hurry))
			first++
		}
		r.senders = append(r.senders, ms)
	}
	return r
}

// drawFault draws a fault for smtptest.
func drawFault(rng *rand.Rand, chunking bool) (f smtptest.Fault) {
	steps := []smtptest.Step{smtptest.Mail, smtptest.Rcpt, smtptest.Data, smtptest.Bdat, smtptest.Body, smtptest.FinalDot, smtptest.Accepted, smtptest.Rset}
	f.At = steps[rng.IntN(len(steps))]
	f.Pipelined = f.At != smtptest.Body && rng.IntN(2) == 0
	f.Nth, f.Count = 1+rng.IntN(40), 1+rng.IntN(4)
	if f.At == smtptest.Body {
		f.AfterBytes = rng.Int64N(100 << 10)
	}
	switch effect := rng.IntN(5); {
	case effect == 0 && !chunking: // in chunks the rest of a body would be read as commands
		f.Discard = true
	case effect <= 1 && f.At != smtptest.Accepted: // a relay that has the message but refuses it is beyond help
		f.Reply = []string{"451 4.3.0 not now", "503 5.5.1 bad sequence of commands", "550 5.7.1 no"}[rng.IntN(3)]
	case effect == 2 && f.At != smtptest.Accepted:
		f.Reply, f.Drop = "421 4.3.2 going down", true
	case effect == 3:
		f.Drop = true
	default:
		f.Abort = true
	}
	return f
}

func drawMessage(rng *rand.Rand, id int, calm bool, hurry time.Duration) *message {
	one := func(in int) bool { return rng.IntN(in) == 0 }
	m := &message{id: id, kind: bodyKind(rng.IntN(int(bodyKinds))), deadline: -1, pieces: rng.Uint64(), all: one(5)}
	switch n := rng.IntN(100); {
	case n < 30:
		m.size = 61 << 10
	case n < 60:
		m.size = 1 + rng.IntN(4<<10)
	case n < 98:
		m.size = int(math.Pow(256<<10, rng.Float64())) // equally of all orders of magnitude
	default:
		m.size = 1<<20 + rng.IntN(3<<20)
	}
	for n := range []int{1, 1, 1, 1, 2, 5}[rng.IntN(6)] {
		word := "ok"
		switch {
		case one(12):
			word = "gone"
		case one(24):
			word = "later"
		}
		m.to = append(m.to, recipient(word, n, id))
	}
	if calm {
		return m
	}
	if m.kind != asBytes && one(8) {
		m.failAt = 1 + rng.IntN(m.size)
	}
	if m.kind != asBytes && one(8) {
		m.cancelAt = 1 + rng.IntN(m.size)
	}
	if !one(3) {
		m.deadline = time.Duration(rng.Int64N(int64(hurry)))
	}
	m.again = rng.IntN(3)
	return m
}

func (r *round) messages() (ms []*message) {
	for _, s := range r.senders {
		ms = append(ms, s...)
	}
	return ms
}

// run runs the round and returns the judgement.
func (r *round) run(t testing.TB) tally {
	relay := start(t, r.setup, r.messages())
	cfg := relay.config
	cfg.Limits, cfg.Retry, cfg.Pipelining = r.limits, r.retry, r.pipelining
	cfg.MaxInFlight = r.inFlight
	cfg.Limits.MaxConns = r.maxConns
	if cfg.Retry.MinBackoff == 0 {
		cfg.Retry.MinBackoff, cfg.Retry.MaxBackoff = time.Millisecond, 4*time.Millisecond
	}
	if r.password != "" {
		cfg.Username, cfg.Password = "user", r.password
	}
	limit := 20 * time.Second // more than a relay under load takes
	if r.forgets() {
		limit, cfg.Timeouts.Overlap = time.Second, 100*time.Millisecond
	}
	cfg.Timeouts.Command, cfg.Timeouts.Data, cfg.Timeouts.FinalReply, cfg.Timeouts.Quit = limit, limit, limit, limit
	client, err := smtprelay.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var callers sync.WaitGroup
	var mu sync.Mutex
	var all []*told
	for _, ms := range r.senders {
		callers.Go(func() {
			var mine []*told
			var buf []byte
			for _, m := range ms {
				mine = append(mine, send(client, m, &buf)...)
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, mine...)
		})
	}
	callers.Wait()
	client.Close()
	relay.close(t)
	if r.calm {
		relay.calmness(all)
	}
	if !r.forgets() {
		relay.silence(all)
	}
	if r.told != nil {
		r.told(relay.ledger, all)
	}
	return relay.ledger.judge(all)
}

// send sends m, and again if its caller may, with the body in buf.
func send(client *smtprelay.Client, m *message, buf *[]byte) (all []*told) {
	for try := 0; ; try++ {
		*buf = m.appendBody((*buf)[:0])
		deadline := m.deadline
		if try > 0 && try == m.again {
			deadline = -1
		}
		ctx, cancel := context.WithCancel(context.Background())
		if deadline >= 0 {
			ctx, cancel = context.WithTimeout(context.Background(), deadline)
		}
		receipt, err := client.Send(ctx, smtprelay.Message{From: sender(m.id), To: m.to, AllOrNothing: m.all, Body: m.body(*buf, cancel)})
		cancel()
		clear(*buf) // must not be read any more
		all = append(all, &told{m, receipt, err})
		if try >= m.again || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted {
			return all
		}
	}
}

// calmness complains about each message that a relay without faults would have accepted, but did not.
func (r *relay) calmness(all []*told) {
	for _, t := range all {
		refused := 0
		for _, to := range t.m.to {
			if isRefused(to) {
				refused++
			}
		}
		_, each := t.outcome()
		for to, o := range each {
			want := smtprelay.Accepted
			if isRefused(to) || t.m.all && refused > 0 {
				want = smtprelay.NotAccepted
			}
			if o != want {
				r.ledger.complain("<%s>: %v in calm weather: %v", to, o, t.err)
			}
		}
	}
	if r.fake != nil && !r.proxied && r.fake.Stats().MaxOpen > r.maxConns {
		r.ledger.complain("%d connections at once, MaxConns is %d", r.fake.Stats().MaxOpen, r.maxConns)
	}
}

// silence complains about each Send that timed out although the relay discards no replies.
func (r *relay) silence(all []*told) {
	for _, t := range all {
		if e, ok := errors.AsType[*smtprelay.Error](t.err); ok && t.m.deadline < 0 && e.Timeout() {
			r.ledger.complain("message %d timed out: %v", t.m.id, e)
		}
	}
}

// stacks returns the stacks of all goroutines.
func stacks() string {
	buf := make([]byte, 4<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

// running counts the goroutines of the client and of the relays here.
func running() int {
	n := -1 // not counting this goroutine
	for g := range strings.SplitSeq(stacks(), "\n\n") {
		if isOurs(g) {
			n++
		}
	}
	return n
}

// isOurs reports whether a goroutine with the stack g must end.
//
// go-smtp's server leaks one now and then (seen in v0.25.1). The goroutine that reads the chunks of an abandoned message sends
// its result to the connection's current channel. If that channel belongs to the next message, and that message is abandoned too,
// the channel has room for one of the two results, and its reader is gone.
func isOurs(g string) bool {
	header, stack, _ := strings.Cut(g, "\n")
	if strings.Contains(header, "[chan send") && strings.HasPrefix(stack, "github.com/emersion/go-smtp.(*Conn).handleBdat.func1(") {
		return false
	}
	return strings.Contains(g, "smtprelay/smtprelay") || strings.Contains(g, "emersion/go-smtp")
}
