package sockets

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/smtprelay/smtprelay"
)

// The ledger of a relay, what callers were told, and the comparison of both.

// ledger is what a relay has accepted.
type ledger struct {
	mu       sync.Mutex // guards the fields below
	messages map[int]*message
	entries  []entry
	faults   []string // complaints of the relay itself
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

// accept records a message that the relay has accepted, before the relay replies.
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

// complain records something that no client may do.
func (l *ledger) complain(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults = append(l.faults, fmt.Sprintf(format, args...))
}

// told is the result of one Send.
type told struct {
	m       *message
	receipt smtprelay.Receipt
	err     error
}

// outcome is the outcome of the message, and of each recipient.
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

// tally counts Sends, and their faults.
type tally struct {
	sends, accepted, notAccepted, unknown int
	truncated                             int // accepted by the relay but truncated
	mixed                                 int // contains octets of something else
	falseNegatives                        int // the relay has it, but the caller was told that it was not accepted
	lost                                  int // the caller was told that it was accepted, but the relay does not have it
	twice                                 int // the relay has more copies than the caller can know of
	strangers                             int // it went to somebody who is not its recipient
	others                                int // other faults
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

// judge compares what the relay has accepted with what callers were told.
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
			a.fault(&a.mixed, "message %d is not as sent: %s", id, e.detail)
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
