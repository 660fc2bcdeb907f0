// Package storm runs random senders against a random relay and compares the relay's ledger with the result of every Send. This
// file has the tests, and a run from its seed to its end. If a seed shows a new fault of the client, add it to TestStormFound.
package storm

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"iter"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
)

// A seed determines the senders, their messages, what they give up and when, the client's configuration, when it is closed, and a
// relay on which anything can go wrong. At the end the relay's ledger is compared with the result of every Send. All of it
// happens in a synctest bubble, where waiting takes no time.
var (
	stormSeeds = flag.Int("storm.seeds", stormDefault, "how many seeds TestStorm runs")
	stormFrom  = flag.Uint64("storm.from", 1, "the first of them")
	stormSeed  = flag.Uint64("storm.seed", 0, "run this seed alone and print its transcript")
)

func TestStorm(t *testing.T) {
	stormTLS()
	if *stormSeed != 0 {
		run := stormOnce(t, *stormSeed)
		t.Log(run.describe(0))
		for _, p := range run.problems {
			t.Error(p)
		}
		return
	}
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // a seed keeps little memory
	t.Logf("seeds %d to %d", *stormFrom, *stormFrom+uint64(*stormSeeds)-1)
	var next atomic.Uint64
	var all stormTally
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() { // ends when the seeds are used up
			for {
				n := next.Add(1) - 1
				if n >= uint64(*stormSeeds) || t.Failed() && n > 50 {
					return
				}
				all.add(stormReport(t, *stormFrom+n))
			}
		})
	}
	workers.Wait()
	t.Log(all.String())
	if *stormSeeds >= stormDefault {
		all.check(t)
	}
}

// TestStormFound runs the seeds that found a fault of the client, a few times each, since the scheduler has an influence. A
// change to what is drawn from a seed changes its storm: then look for new seeds, by undoing the fix (tools/mutants undoes some).
func TestStormFound(t *testing.T) {
	stormTLS()
	for _, found := range []struct {
		fault string
		seeds []uint64
	}{
		{"one refused recipient ended the others in another transaction", []uint64{9}},
		{"a timer of an earlier failure made the pool forget waiters", []uint64{21}},
		{"the slot of a connection that was never ready was free before the relay had closed it", []uint64{21}},
		{"the slot of a session that was abandoned after QUIT was free too early", []uint64{163, 3036004}},
		{"a write in progress counted as sent, and a truncated chunk ended with FIN", []uint64{134}},
		{"messages after a 421 were unknown", []uint64{363, 407, 3038262}},
		{"354 to RCPT, from a relay that had discarded RSET, was reported as a refusal", []uint64{792}},
		{"replies to an envelope whose RSET was discarded were believed", []uint64{201533, 303793}},
		{"a Reader was not retried after a 421 to MAIL, since its beginning had been read", []uint64{1057354}},
		{"a message went to the recipients of another, after a refused RSET", []uint64{33167, 40284}},
	} {
		t.Run(found.fault, func(t *testing.T) {
			for _, seed := range slices.Repeat(found.seeds, 5) {
				stormReport(t, seed)
			}
		})
	}
}

// stormReport runs a seed and reports its faults.
func stormReport(t *testing.T, seed uint64) *stormRun {
	run := stormOnce(t, seed)
	if len(run.problems) > 0 {
		t.Errorf("seed %d: %s\n%s\n    go test -run 'TestStorm$' -storm.seed=%d -count=20 ./internal/test/storm", seed,
			strings.Join(run.problems, "\n    "), run.describe(150), seed)
	}
	return run
}

// stormOnce runs one seed in a new bubble.
func stormOnce(t *testing.T, seed uint64) (run *stormRun) {
	run = &stormRun{p: newStormPlan(seed), cancels: map[int]context.CancelFunc{}}
	defer func() {
		if p := recover(); p != nil { // a deadlock: a goroutine is left that waits for ever
			run.problem("the bubble: %v", p)
		}
	}()
	synctest.Test(t, func(t *testing.T) { run.do() })
	return run
}

// stormRun is a run of a seed.
type stormRun struct {
	p      *stormPlan
	relay  *stormRelay
	client *smtprelay.Client
	ending atomic.Bool // Close or Shutdown was called
	ended  atomic.Bool // and has returned

	mu       sync.Mutex // guards the fields below
	cancels  map[int]context.CancelFunc
	told     []*stormTold
	problems []string
}

func (r *stormRun) problem(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.problems = append(r.problems, fmt.Sprintf(format, args...))
}

func (r *stormRun) do() {
	r.relay = newStormRelay(r.p.seed, r.p.weather)
	r.relay.happens = r.happens
	r.p.config.Dial = r.relay.dial
	client, err := smtprelay.New(r.p.config)
	if err != nil {
		r.problem("New: %v", err)
		return
	}
	r.client = client
	var work sync.WaitGroup
	for i, ms := range r.p.senders {
		work.Go(func() {
			if r.p.together[i] {
				r.sendTogether(ms, r.p.breakAt[i])
				return
			}
			for _, m := range ms {
				time.Sleep(m.pause)
				r.send(m)
			}
		})
	}
	for range r.p.pings {
		work.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			client.Ping(ctx) // its error is not judged: it depends on the weather
		})
	}
	if r.p.endAt > 0 {
		work.Go(func() {
			time.Sleep(r.p.endAt)
			r.end()
		})
	}
	if !stormWithin(365*24*time.Hour, work.Wait) {
		r.problem("a goroutine waits for ever:\n%s", stormStacks())
		return
	}
	r.end()
	r.leftovers()
	r.relay.finish()
	synctest.Wait()
	judge := stormJudge{p: r.p, relay: r.relay}
	for _, told := range r.told {
		judge.judge(told)
	}
	r.problems = append(r.problems, judge.problems...)
	r.problems = append(r.problems, r.relay.violations...)
}

// stormWithin reports whether f returns within d.
func stormWithin(d time.Duration, f func()) bool {
	done := make(chan struct{})
	go func() { // ends with f
		f()
		close(done)
	}()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}

// send sends one message as planned.
func (r *stormRun) send(m *stormMessage) {
	told := &stormTold{m: m, began: time.Now(), closed: r.ended.Load(), viaSendMail: m.viaSendMail}
	if m.viaSendMail {
		told.err = r.client.SendMail(m.sender(), m.to, m.raw)
	} else {
		ctx := r.context(m, m)
		told.receipt, told.err = r.client.Send(ctx, m.message(ctx.cancel))
		told.gaveUp = ctx.hasEnded()
		r.hanging(ctx)
		ctx.cancel()
	}
	r.note(told)
}

func (r *stormRun) note(told *stormTold) {
	told.ended, told.closing = time.Now(), r.ending.Load()
	r.relay.log.add(0, "==", fmt.Sprintf("message %d: %v", told.m.id, told.err))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told = append(r.told, told)
}

// hanging finds what a call has left registered on its context.
func (r *stormRun) hanging(ctx *stormContext) {
	if n := ctx.watchers.Load(); n > 0 && ctx.Err() == nil {
		r.problem("%d watchers are left on the context of a call that has returned", n)
	}
}

// sendTogether sends messages with SendAll.
func (r *stormRun) sendTogether(ms []*stormMessage, breakAt int) {
	began, closed := time.Now(), r.ended.Load()
	ctx := r.context(ms[0], ms...)
	var taken, late atomic.Int64 // late: one that may have come when SendAll had ended, and has no result then
	gone := make(chan struct{})
	seq := func(yield func(smtprelay.Message) bool) {
		defer close(gone)
		for _, m := range ms {
			time.Sleep(m.pause)
			taken.Add(1)
			if !yield(m.message(ctx.cancel)) {
				late.Store(1)
				return
			}
		}
	}
	told := map[int]*stormTold{}
	for res := range r.client.SendAll(ctx, iter.Seq[smtprelay.Message](seq)) {
		id := stormID(res.Message.To[0])
		if told[id] != nil {
			r.problem("message %d: SendAll has returned two results", id)
		}
		i := slices.IndexFunc(ms, func(m *stormMessage) bool { return m.id == id })
		told[id] = &stormTold{m: ms[i], receipt: res.Receipt, err: res.Err, began: began, closed: closed, together: true}
		told[id].gaveUp = ctx.hasEnded()
		r.note(told[id])
		if breakAt > 0 && len(told) >= breakAt {
			break
		}
	}
	<-gone
	if n := int(taken.Load()); breakAt == 0 && (len(told) > n || len(told) < n-int(late.Load())) {
		r.problem("SendAll took %d messages and returned %d results", n, len(told))
	}
	r.hanging(ctx)
	ctx.cancel()
	for _, m := range ms {
		if told[m.id] == nil {
			r.note(&stormTold{m: m, untold: true})
		}
	}
}

// sender is m.from in the form of a Message.
func (m *stormMessage) sender() string {
	if m.from == "" {
		return smtprelay.NullSender
	}
	return m.from
}

// message returns the Message for the client.
func (m *stormMessage) message(cancel context.CancelFunc) smtprelay.Message {
	return smtprelay.Message{From: m.sender(), To: m.to, Body: m.body(cancel), AllOrNothing: m.all}
}

// context returns the context of m, which each message of ms may end.
func (r *stormRun) context(m *stormMessage, ms ...*stormMessage) *stormContext {
	inner, cancel := context.WithCancel(context.Background())
	if m.deadline > 0 {
		inner, cancel = context.WithTimeout(context.Background(), m.deadline)
	}
	ctx := &stormContext{Context: inner}
	ctx.cancel = func() {
		now := time.Now()
		ctx.ended.CompareAndSwap(nil, &now)
		cancel()
	}
	if m.giveUpAfter > 0 {
		giveUp := time.AfterFunc(m.giveUpAfter, ctx.cancel)
		context.AfterFunc(inner, func() { giveUp.Stop() })
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range ms {
		r.cancels[m.id] = ctx.cancel
	}
	return ctx
}

// stormContext counts its watchers.
type stormContext struct {
	context.Context
	cancel   context.CancelFunc
	ended    atomic.Pointer[time.Time]
	watchers atomic.Int64
}

// Value hides the cancelCtx of package context inside, so that AfterFunc below is called.
func (c *stormContext) Value(any) any { return nil }

// AfterFunc is how package context registers contexts and functions on a context of another type.
func (c *stormContext) AfterFunc(f func()) (stop func() bool) {
	c.watchers.Add(1)
	inner := context.AfterFunc(c.Context, f)
	return func() bool {
		stopped := inner()
		if stopped {
			c.watchers.Add(-1)
		}
		return stopped
	}
}

// hasEnded returns when the context ended; zero means not yet.
func (c *stormContext) hasEnded() time.Time {
	if c.Err() == nil {
		return time.Time{}
	}
	if at := c.ended.Load(); at != nil {
		return *at
	}
	at, _ := c.Deadline()
	return at
}

// happens is called by the relay at each step.
func (r *stormRun) happens(at stormStage, msg int) {
	if msg < 0 {
		return
	}
	r.mu.Lock()
	cancel := r.cancels[msg]
	r.mu.Unlock()
	if cancel != nil && r.p.message(msg).giveUpAt == at {
		cancel()
	}
}

func (p *stormPlan) message(id int) *stormMessage {
	for _, ms := range p.senders {
		for _, m := range ms {
			if m.id == id {
				return m
			}
		}
	}
	panic(fmt.Sprintf("storm: no message %d", id))
}

// end ends the client as planned; the second time it closes it.
func (r *stormRun) end() {
	began := time.Now()
	defer r.ended.Store(true)
	if again := r.ending.Swap(true); !again && r.p.ending == endsWithShutdown {
		ctx, cancel := context.WithTimeout(context.Background(), r.p.grace)
		defer cancel()
		r.relay.log.add(0, "==", fmt.Sprintf("Shutdown within %v", r.p.grace))
		err := r.client.Shutdown(ctx)
		r.relay.log.add(0, "==", fmt.Sprintf("Shutdown: %v", err))
		if (err != nil) && (ctx.Err() == nil || !errors.Is(err, context.DeadlineExceeded)) {
			r.problem("Shutdown: %v", err)
		}
		if took := time.Since(began); took > r.p.grace+r.p.weather.quit+time.Second {
			r.problem("Shutdown took %v, its limit was %v", took, r.p.grace)
		}
		return
	}
	r.relay.log.add(0, "==", "Close")
	if err := r.client.Close(); err != nil {
		r.problem("Close: %v", err)
	}
	r.relay.log.add(0, "==", "Close has returned")
	if took := time.Since(began); took > r.p.weather.quit+time.Second {
		r.problem("Close took %v", took)
	}
}

// leftovers finds what is left after Close.
func (r *stormRun) leftovers() {
	r.end()
	synctest.Wait()
	for g := range strings.SplitSeq(stormStacks(), "\n\n") {
		if strings.Contains(g, "smtprelay/smtprelay.") {
			r.problem("a goroutine is left after Close:\n%s", g)
		}
	}
	for _, c := range r.relay.conns {
		c.client.mu.Lock()
		if !c.client.closed {
			r.problems = append(r.problems, fmt.Sprintf("connection %d is open after Close", c.n))
		}
		c.client.mu.Unlock()
	}
	s := r.client.Stats()
	if s.OpenConns != 0 || s.IdleConns != 0 || s.Waiting != 0 {
		r.problem("after Close: %d connections open, %d idle, %d Sends waiting", s.OpenConns, s.IdleConns, s.Waiting)
	}
}

// stormStacks returns the stacks of the goroutines of this bubble, except this one.
func stormStacks() string {
	buf := make([]byte, 1<<16)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	all := strings.Split(string(buf), "\n\n")
	_, bubble, _ := strings.Cut(strings.SplitN(all[0], "\n", 2)[0], "synctest bubble ")
	mine := slices.DeleteFunc(all[1:], func(g string) bool {
		return !strings.Contains(strings.SplitN(g, "\n", 2)[0], "synctest bubble "+bubble)
	})
	return strings.Join(mine, "\n\n")
}

// describe returns a run's plan, and the last events of its transcript, or all if most is 0.
func (r *stormRun) describe(most int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "    weather %+v\n    limits %+v\n    retry %+v\n    timeouts %+v\n", r.p.weather, r.p.config.Limits, r.p.config.Retry, r.p.config.Timeouts)
	for i, ms := range r.p.senders {
		for _, m := range ms {
			fmt.Fprintf(&b, "    sender %d: message %d to %v, %d octets, kind %d, all %v, pause %v, gives up after %v, at %q, in body %v, deadline %v\n", i,
				m.id, m.to, len(m.raw), m.kind, m.all, m.pause, m.giveUpAfter, m.giveUpAt, m.giveUpInBody, m.deadline)
		}
	}
	if r.relay != nil {
		b.WriteString(r.relay.log.text(most))
	}
	return b.String()
}

// stormTally sums up what the seeds met, so that a storm that meets nothing fails.
type stormTally struct {
	mu       sync.Mutex // guards the fields below
	told     map[string]int
	faults   [allStormFaults]int
	taken    int
	overlaps int64
}

func (a *stormTally) add(r *stormRun) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.told == nil {
		a.told = map[string]int{}
	}
	for _, told := range r.told {
		e, _ := errors.AsType[*smtprelay.Error](told.err)
		switch {
		case told.untold:
			a.told["untold"]++
		case e == nil:
			a.told["accepted"]++
		case e.Outcome == smtprelay.Accepted:
			a.told["accepted for some"]++
		default:
			a.told[e.Outcome.String()]++
		}
	}
	if r.relay == nil {
		return
	}
	for f, n := range r.relay.faults {
		a.faults[f] += n
	}
	for _, as := range r.relay.attempts {
		for _, attempt := range as {
			if attempt.taken {
				a.taken++
			}
		}
	}
	if r.client != nil {
		a.overlaps += r.client.Stats().Overlapped
	}
}

func (a *stormTally) String() string {
	s := fmt.Sprintf("%v, %d copies taken, %d transactions overlapped; faults:", a.told, a.taken, a.overlaps)
	for f, n := range a.faults {
		if n > 0 {
			s += fmt.Sprintf(" %d %v,", n, stormFault(f))
		}
	}
	return strings.TrimSuffix(s, ",")
}

// check fails if something never happened.
func (a *stormTally) check(t *testing.T) {
	for _, outcome := range []string{"accepted", "accepted for some", "not accepted", "unknown"} {
		if a.told[outcome] == 0 {
			t.Errorf("no Send ever returned %q", outcome)
		}
	}
	for f := noFault + 1; f < allStormFaults; f++ {
		if a.faults[f] == 0 {
			t.Errorf("this never went wrong: %v", f)
		}
	}
	if a.overlaps == 0 {
		t.Error("no transaction ever overlapped another")
	}
}
