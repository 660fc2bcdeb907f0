package sockets

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/smtprelay/smtprelay"
)

// The ledger of a relay, what callers were told, and the judgement of the one by the other.

// ledger is what a relay has accepted.
type ledger struct {
	mu       sync.Mutex // guards the fields below
	messages map[int]*message
	entries  []entry
	faults   []string // what the relay itself has to complain of
}

type entry struct {
	from   string
	to     []string
	fault  string // "", "truncated" or "mixed"
	detail string
}

func newLedger(ms []*message) *ledger {
	l := &ledger{messages: map[int]*message{}}
	for _, m := range ms {
		l.messages[m.id] = m
	}
	return l
}

// accept notes a message that the relay has accepted, before the relay says so.
func (l *ledger) accept(from string, to []string, body []byte) {
	e := entry{from: from, to: to}
	if m := l.messages[idOf(to[0])]; m != nil {
		e.fault, e.detail = m.inspect(body)
	} else {
		e.fault, e.detail = "mixed", fmt.Sprintf("%.200q", body)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, e)
}

// complain notes what no client may do.
func (l *ledger) complain(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults = append(l.faults, fmt.Sprintf(format, args...))
}

// told is what the caller of one Send was told.
type told struct {
	m       *message
	receipt smtprelay.Receipt
	err     error
}

// outcome is the fate of the message, and of each recipient.
func (t *told) outcome() (smtprelay.Outcome, map[string]smtprelay.Outcome) {
	all := smtprelay.Accepted
	if e, ok := errors.AsType[*smtprelay.Error](t.err); ok {
		all = e.Outcome
	} else if t.err != nil {
		panic(fmt.Sprintf("Send returned a %T", t.err))
	}
	each := map[string]smtprelay.Outcome{}
	for _, to := range t.m.to {
		each[to] = all
	}
	for _, r := range t.receipt.Recipients {
		each[r.To] = r.Outcome
	}
	return all, each
}

// tally counts Sends, and what was wrong with them.
type tally struct {
	sends, accepted, notAccepted, unknown int
	truncated                             int // accepted by the relay, and not whole
	mixed                                 int // octets in it that are not of this message
	falseNegatives                        int // the relay has it, and the caller was told that nobody has
	lost                                  int // the caller was told that it is accepted, and the relay does not have it
	twice                                 int // the relay has more copies than the caller can know of
	strangers                             int // somebody got it who is no recipient of it
	others                                int // faults of other kinds
	faulty                                []string
}

func (a *tally) fault(counter *int, format string, args ...any) {
	*counter++
	if len(a.faulty) < 8 {
		a.faulty = append(a.faulty, fmt.Sprintf(format, args...))
	}
}

func (a *tally) bad() int {
	return a.truncated + a.mixed + a.falseNegatives + a.lost + a.twice + a.strangers + a.others
}

func (a *tally) add(b tally) {
	a.sends, a.accepted, a.notAccepted, a.unknown = a.sends+b.sends, a.accepted+b.accepted, a.notAccepted+b.notAccepted, a.unknown+b.unknown
	a.truncated, a.mixed, a.falseNegatives, a.lost = a.truncated+b.truncated, a.mixed+b.mixed, a.falseNegatives+b.falseNegatives, a.lost+b.lost
	a.twice, a.strangers, a.others = a.twice+b.twice, a.strangers+b.strangers, a.others+b.others
}

func (a *tally) String() string {
	return fmt.Sprintf("%d sends: %d accepted, %d not accepted, %d unknown; %d truncated, %d mixed, %d false negatives, "+
		"%d receipts without mail, %d twice, %d to strangers, %d other faults", a.sends, a.accepted, a.notAccepted, a.unknown,
		a.truncated, a.mixed, a.falseNegatives, a.lost, a.twice, a.strangers, a.others)
}

// judge holds what the relay has accepted against what callers were told.
func (l *ledger) judge(all []*told) tally {
	l.mu.Lock()
	defer l.mu.Unlock()
	var a tally
	for _, f := range l.faults {
		a.fault(&a.others, "%s", f)
	}
	copies := map[string]int{}
	for _, e := range l.entries {
		id := idOf(e.to[0])
		switch e.fault {
		case "truncated":
			a.fault(&a.truncated, "message %d is truncated: %s", id, e.detail)
		case "mixed":
			a.fault(&a.mixed, "message %d is not what was sent: %s", id, e.detail)
		}
		for _, to := range e.to {
			copies[to]++
			if idOf(to) == 0 || idOf(to) != idOf(e.from) {
				a.fault(&a.strangers, "a message from <%s> went to <%s>", e.from, strings.Join(e.to, ">, <"))
				break
			}
		}
	}
	accepted, unknown := map[string]int{}, map[string]int{}
	fates := map[*message][]string{}
	for _, t := range all {
		a.sends++
		outcome, each := t.outcome()
		switch outcome {
		case smtprelay.Accepted:
			a.accepted++
		case smtprelay.NotAccepted:
			a.notAccepted++
		default:
			a.unknown++
		}
		fates[t.m] = append(fates[t.m], fmt.Sprintf("%v (%v)", outcome, t.err))
		for to, o := range each {
			if t.err == nil && o != smtprelay.Accepted || outcome == smtprelay.NotAccepted && o != smtprelay.NotAccepted {
				a.fault(&a.others, "<%s>: the receipt says %v, the error %v", to, o, t.err)
			}
			switch o {
			case smtprelay.Accepted:
				accepted[to]++
			case smtprelay.Unknown:
				unknown[to]++
			}
		}
	}
	for m, fate := range fates {
		for _, to := range m.to {
			n, least, most := copies[to], accepted[to], accepted[to]+unknown[to]
			switch {
			case n < least:
				a.fault(&a.lost, "<%s>: %d receipts, the relay has %d copies; told %s", to, least, n, strings.Join(fate, ", "))
			case n > most && most == 0:
				a.fault(&a.falseNegatives, "<%s>: the relay has %d copies; told %s", to, n, strings.Join(fate, ", "))
			}
			if n > max(most, 1) {
				a.fault(&a.twice, "<%s>: the relay has %d copies; told %s", to, n, strings.Join(fate, ", "))
			}
		}
	}
	return a
}
