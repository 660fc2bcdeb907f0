// Plays every transcript again with the connection lost after each octet, and checks the rules that hold whatever happens.
package dialogue

import (
	"errors"
	"flag"
	"fmt"
	"hash/maphash"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
)

var every = flag.Int("cut-every", 0, "play every nth of the dialogues with a cut; 1 is all; 0 is every 4th, and every 64th under the race detector")

// said is data that passed in a run by the script.
type said struct {
	conn   int
	dir    direction
	text   string
	played int // number of lines of the script that were played before
}

// TestDialogueCutAnywhere plays each script again with a connection lost after the Nth octet in either direction, for every N.
// The relay keeps to the script until then, and improvises afterwards. Whatever happens, the rules of truths must hold.
func TestDialogueCutAnywhere(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // a run keeps little memory
	plan := cuts(t)
	thin(plan)
	var total atomic.Int64
	t.Run("scripts", func(t *testing.T) { // returns when all parallel subtests are done
		for s, ks := range plan {
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				for _, k := range ks {
					d := newDialogue(s)
					d.cut = k
					err := d.run(t)
					total.Add(1)
					if err != nil {
						t.Fatalf("%s\nlost after octet %d %s of connection %d, reset %t, new connections refused %t: %v",
							d.transcript(), k.at, k.dir, k.conn, k.reset, k.refuse, err)
					}
				}
				t.Logf("%d cases", len(ks))
			})
		}
	})
	t.Logf("%d cases", total.Load())
}

// cuts plans the cuts of each script. Scripts share beginnings, so a cut that would repeat another script's to the octet is
// omitted. Around line ends all variants are played, elsewhere one of four.
func cuts(t *testing.T) map[*script][]*cut {
	plan := map[*script][]*cut{}
	known := map[uint64]bool{}
	seed := maphash.MakeSeed()
	for _, s := range readScripts(t) {
		if s.config["cut"] == "off" {
			continue
		}
		d := newDialogue(s)
		if err := d.run(t); err != nil {
			t.Logf("%s fails without a cut and is not cut: see TestDialogue", s.name)
			t.Fail()
			continue
		}
		add := func(conn int, dir direction, at int, all bool) {
			for v := range 4 {
				if all || v == at%4 {
					plan[s] = append(plan[s], &cut{conn: conn, dir: dir, at: at, reset: v%2 == 1, refuse: v/2 == 1})
				}
			}
		}
		if _, secure := s.config["tls"]; secure {
			// These octets are TLS records of varying length: count them without comparing.
			for _, c := range d.conns {
				for at := 0; at < int(c.link.written.Load()); at += 37 {
					add(c.n, toRelay, at, false)
				}
				for at := 0; at < int(c.link.read.Load()); at += 37 {
					add(c.n, toClient, at, false)
				}
			}
			continue
		}
		config := fmt.Sprint(s.config)
		offset := map[int]map[direction]int{}
		for _, x := range d.said {
			if offset[x.conn] == nil {
				offset[x.conn] = map[direction]int{}
			}
			before := config + "\n" + strings.Join(d.played[:x.played], "\n")
			for i := range len(x.text) {
				at := offset[x.conn][x.dir] + i
				edge := strings.Contains(x.text[max(0, i-2):min(len(x.text), i+1)], "\n")
				if i > 500 && i%31 != 0 && !edge || i > 2000 && i%1009 != 0 {
					continue // in the middle of a long text
				}
				key := maphash.String(seed, fmt.Sprint(x.conn, x.dir, at, before, "\n", x.text[:i]))
				if known[key] {
					continue
				}
				known[key] = true
				add(x.conn, x.dir, at, edge)
			}
			offset[x.conn][x.dir] += len(x.text)
		}
	}
	return plan
}

// thin keeps every nth case of plan.
func thin(plan map[*script][]*cut) {
	n := *every
	if n == 0 {
		n = 4
	}
	if info, ok := debug.ReadBuildInfo(); ok && *every == 0 && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		n = 64
	}
	if n <= 1 {
		return
	}
	for s, ks := range plan {
		var left []*cut
		for i := len(s.name) % n; i < len(ks); i += n { // different places in each script
			left = append(left, ks[i])
		}
		plan[s] = left
	}
}

// outlive lets all calls end after a cut.
func (d *dialogue) outlive() error {
	time.Sleep(3 * time.Hour) // far longer than all timeouts and attempts together
	synctest.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, c := range d.calls {
		if c.returned == 0 && c.panicked == nil {
			errs = append(errs, fmt.Errorf("call %s has not ended within 3 hours", c.name))
		}
	}
	return errors.Join(errs...)
}

// truths checks the outcome of every Send against the data that passed: the rules that hold whatever happens.
func (d *dialogue) truths() error {
	var errs []error
	wrong := func(c *call, format string, args ...any) {
		errs = append(errs, fmt.Errorf("call %s ended %s: %s", c.name, c.outcome(), fmt.Sprintf(format, args...)))
	}
	for _, c := range d.calls {
		if c.panicked != nil {
			errs = append(errs, fmt.Errorf("call %s panicked: %v", c.name, c.panicked))
			continue
		}
		if c.returned != 1 {
			errs = append(errs, fmt.Errorf("call %s ended %d times", c.name, c.returned))
			continue
		}
		if err := c.consistent(); err != nil {
			wrong(c, "%v", err)
		}
		if c.kind != "send" {
			continue
		}
		taken := map[string]bool{} // recipients to whom the message must not be offered again
		accepted, open := map[string]bool{}, map[string]bool{}
		ends := map[string]int{} // times that the end of the message may have been sent for a recipient
		for _, x := range d.offered() {
			var offered []string
			for i, to := range x.to {
				if x.possible(i) {
					offered = append(offered, to)
				}
			}
			if len(offered) == 0 || !c.owns(x) {
				continue
			}
			ended := x.dot || x.short && x.body == c.form(x)
			if strings.Contains(x.body, "\n") || ended { // enough to distinguish it from an empty one
				for _, to := range offered {
					if taken[to] {
						wrong(c, "it was offered to %s again", to)
					}
				}
			}
			if !ended {
				continue
			}
			for _, to := range x.to {
				if ends[to]++; c.asks && ends[to] > c.allowed[to] {
					wrong(c, "its end was sent for %s, but BeforeEnd has returned nil %d times", to, c.allowed[to])
				}
			}
			if !c.whole {
				wrong(c, "a message whose body fails got its final dot")
			} else if x.body != c.form(x) {
				wrong(c, "the relay got something else than the body: %q", x.body)
			}
			told := open // as far as the call can know
			switch {
			case x.final == 0 || x.when > c.when:
			case x.final/100 == 2 && x.mail/100 != 2: // it is unclear for whom
			case x.final/100 == 2:
				told = accepted
			case x.final/100 == 4 || x.final/100 == 5:
				if _, again := d.script.config["temporary"]; again || x.final == 421 || x.final == 432 || x.slow {
					continue // it may be retried
				}
				told = map[string]bool{}
			}
			for _, to := range offered {
				taken[to], told[to] = true, true
			}
		}
		var outcome smtprelay.Outcome
		if c.err == nil {
			outcome = smtprelay.Accepted
		} else if e, ok := errors.AsType[*smtprelay.Error](c.err); ok {
			outcome = e.Outcome
		}
		switch {
		case outcome == smtprelay.Unknown && len(open) == 0:
			wrong(c, "but it has no final dot that was written in full and got no reply")
		case outcome == smtprelay.Accepted && len(accepted) == 0:
			wrong(c, "but the relay has not said so")
		case outcome == smtprelay.NotAccepted && len(accepted) > 0:
			wrong(c, "but the relay has accepted it")
		case outcome == smtprelay.NotAccepted && len(open) > 0:
			wrong(c, "but its final dot was written and has no reply")
		}
		for _, r := range c.receipt.Recipients {
			want := smtprelay.NotAccepted
			switch {
			case accepted[r.To]:
				want = smtprelay.Accepted
			case open[r.To]:
				want = smtprelay.Unknown
			}
			if r.Outcome != want {
				wrong(c, "the receipt says %v for %s, but it was %v", r.Outcome, r.To, want)
			}
		}
	}
	return errors.Join(errs...)
}

// offered returns the transactions for which the relay was ready to accept a message, in order.
func (d *dialogue) offered() (all []*transaction) {
	for _, c := range d.conns {
		for _, x := range c.ledger.txs {
			if x.data > 0 {
				all = append(all, x)
			}
		}
	}
	slices.SortFunc(all, func(a, b *transaction) int { return a.data - b.data })
	return all
}

// owns reports whether x is a transaction of c, by its envelope and by the part of the body that passed.
func (c *call) owns(x *transaction) bool {
	if x.from != strings.TrimSuffix(strings.TrimPrefix(c.message.From, "<"), ">") {
		return false
	}
	for _, to := range x.to {
		if !slices.Contains(c.message.To, to) {
			return false
		}
	}
	return x.dot || x.short && x.body == c.form(x) || strings.HasPrefix(c.form(x), x.body)
}

// form is the body as x must carry it.
func (c *call) form(x *transaction) string {
	if x.bdat {
		return c.chunks
	}
	return c.wire
}
