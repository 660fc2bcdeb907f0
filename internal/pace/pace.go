// Package pace limits how many messages begin per second, as a configured rate or the relay's replies demand.
package pace

import (
	"math"
	"sync/atomic"
	"time"
)

// Pace decides when the next message may begin. It is not safe for concurrent use, except Accepted.
//
// A relay that throttles does not say how high its limit is. The first such reply sets the rate to the number of messages that
// the relay has accepted in the last second. Two seconds later the rate begins to rise by a quarter each second, until the next
// such reply. Each later reply cuts the rate by a tenth; after two seconds without one it rises by one per cent each second, and
// by ten beyond the rate of that reply: whoever shared the limit has left, or the limit was raised.
// After ten minutes without such a reply the rate is as configured again.
//
// Messages in flight when the rate is cut belong to the previous round: their refusals do not cut it again.
type Pace struct {
	most      float64   // configured messages per second; 0 means no limit
	off       bool      // ignore the relay's replies
	rate      float64   // messages per second; 0 means no limit
	next      time.Time // no message begins before this time
	round     int       // number of cuts
	cutAt     time.Time // when rate was cut last; zero if it was not cut
	first     time.Time // when rate was cut first
	risen     time.Time // when rate was raised last
	refused   float64   // rate when the relay throttled last, before the cut
	searching bool      // rate was cut once, so the relay's limit is not known yet
	recent    recently  // messages that the relay has accepted
}

const (
	least  = 0.1                   // minimum messages per second
	cut    = 0.9                   // factor of a cut
	creep  = 1.01                  // factor per second
	beyond = 1.10                  // factor per second, above the rate at which the relay throttled last
	search = 1.25                  // factor per second, until the second cut
	hold   = 2 * time.Second       // no rise for this long after a cut
	slack  = 20 * time.Millisecond // a message that begins late by up to this does not delay those after it
	memory = 10 * time.Minute
)

// New returns a Pace of rate messages per second: 0 means no limit until the relay throttles, negative means no limit at all.
func New(rate float64) Pace {
	return Pace{most: max(rate, 0), rate: max(rate, 0), off: rate < 0}
}

// Off reports whether the relay's replies are ignored.
func (p *Pace) Off() bool { return p.off }

// Rate returns the messages per second; 0 means no limit.
func (p *Pace) Rate() float64 { return p.rate }

// Round returns the number of cuts so far. A message has the round in which it begins.
func (p *Pace) Round() int { return p.round }

// Next returns the time before which no message begins.
func (p *Pace) Next() time.Time { return p.next }

// Accepted records that the relay has accepted a message. It is safe for concurrent use with itself and all other methods.
func (p *Pace) Accepted(now time.Time) { p.recent.add(now) }

// Slowed reports whether the relay has throttled, and if so, when it last accepted a message; if it has not since then, when it
// first throttled.
func (p *Pace) Slowed() (accepted time.Time, slowed bool) {
	if p.cutAt.IsZero() {
		return time.Time{}, false
	}
	return p.recent.last(p.first), true
}

// Ready reports whether a message may begin now.
func (p *Pace) Ready(now time.Time) bool {
	p.rise(now)
	return p.rate == 0 || !now.Before(p.next)
}

// Begin records that a message begins.
func (p *Pace) Begin(now time.Time) {
	if p.rate == 0 {
		return
	}
	if late := now.Add(-slack); p.next.Before(late) {
		p.next = late
	}
	p.next = p.next.Add(time.Duration(float64(time.Second) / p.rate))
}

// rise raises a rate that was cut, or restores the configured rate.
func (p *Pace) rise(now time.Time) {
	if p.searching && now.Sub(p.first) <= time.Second {
		p.rate = p.within(max(p.rate, float64(p.recent.count(now)))) // messages in flight at the cut may still be accepted
	}
	switch since := now.Sub(p.cutAt); {
	case p.cutAt.IsZero() || since < hold || now.Sub(p.risen) < time.Second/10:
		return
	case since >= memory:
		p.rate, p.cutAt = p.most, time.Time{}
		return
	}
	rise := creep
	switch {
	case p.searching:
		rise = search
	case p.rate > p.refused:
		rise = beyond
	}
	p.rate = p.within(p.rate * math.Pow(rise, now.Sub(p.risen).Seconds()))
	p.risen = now
}

// within returns rate, but at most the configured rate.
func (p *Pace) within(rate float64) float64 {
	if p.most > 0 {
		return min(rate, p.most)
	}
	return rate
}

// TooFast is called when the relay has refused a message of the given round because messages come too fast. It reports whether
// it has changed the rate.
func (p *Pace) TooFast(round int, now time.Time) (changed bool) {
	if p.off || round != p.round {
		return false
	}
	p.round++
	if p.rate == 0 {
		p.rate = max(float64(p.recent.count(now)), 1)
	} else {
		p.refused = p.rate
		p.rate = max(p.rate*cut, least)
	}
	if p.searching = p.cutAt.IsZero(); p.searching {
		p.first = now
	}
	p.cutAt, p.risen = now, now.Add(hold)
	p.next = now.Add(time.Duration(float64(time.Second) / p.rate))
	return true
}

// recently counts the events of the last second, in buckets of a tenth. It is safe for concurrent use.
type recently struct {
	tenths [11]atomic.Uint64 // each: the Unix time in tenths of a second, and in the low 24 bits a count
}

const countBits = 24

// add counts an event.
func (r *recently) add(now time.Time) {
	tenth := uint64(now.UnixMilli() / 100)
	a := &r.tenths[tenth%uint64(len(r.tenths))]
	for {
		old := a.Load()
		count := uint64(1)
		if old>>countBits == tenth {
			count += old & (1<<countBits - 1)
		}
		if a.CompareAndSwap(old, tenth<<countBits|count) {
			return
		}
	}
}

// last returns the time of the last event, to a tenth of a second, but no time before otherwise.
func (r *recently) last(otherwise time.Time) time.Time {
	for i := range r.tenths {
		if t := time.UnixMilli(int64(r.tenths[i].Load()>>countBits) * 100); t.After(otherwise) {
			otherwise = t
		}
	}
	return otherwise
}

// count returns the number of events in the last second.
func (r *recently) count(now time.Time) (n int) {
	tenth := uint64(now.UnixMilli() / 100)
	for i := range r.tenths {
		if v := r.tenths[i].Load(); v>>countBits+10 >= tenth && v>>countBits <= tenth {
			n += int(v & (1<<countBits - 1))
		}
	}
	return n
}
