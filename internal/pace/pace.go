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
// the relay has accepted in the last second. Each later reply cuts the rate by a tenth, but not below nine tenths of what the
// relay has accepted in the last second: a relay that counts in fixed seconds refuses all messages for the rest of a second. A
// rate that is far above what the relay has accepted is set as by the first reply.
//
// After a cut the rate rises: slowly until it is as before the cut, and then faster and faster, because the limit was raised or
// a Client that shared it has left. After ten minutes without such a reply the rate is as configured again.
//
// The slow rise takes longer at a higher rate. A relay refuses each of the Clients that share a limit about as often, whatever
// its share; those with a smaller share regain more between two refusals, so the shares become more equal.
//
// Messages in flight when the rate is cut belong to the previous round: their refusals do not cut it again.
type Pace struct {
	most   float64      // configured messages per second; 0 means no limit
	off    bool         // ignore the relay's replies
	base   float64      // messages per second after the last cut; less early where the rate is estimated
	next   time.Time    // no message begins before this time
	round  int          // number of cuts
	cutAt  time.Time    // when the rate was cut last; zero if it was not cut
	first  time.Time    // when the rate was cut first
	early  atomic.Int64 // accepted messages that began in round 0; some are accepted after the first cut
	recent recently     // messages that the relay has accepted
}

const (
	least  = 0.1                   // minimum messages per second
	cut    = 0.1                   // part of the rate that a reply takes away
	regain = 7.5                   // seconds of the slow rise at one message per second; grows with the square root of the rate
	double = 6                     // seconds after the slow rise until the rate has doubled
	slack  = 20 * time.Millisecond // a message that begins late by up to this does not delay those after it
	memory = 10 * time.Minute
)

// New returns a Pace of rate messages per second: 0 means no limit until the relay throttles, negative means no limit at all.
func New(rate float64) Pace {
	return Pace{most: max(rate, 0), off: rate < 0}
}

// Off reports whether the relay's replies are ignored.
func (p *Pace) Off() bool { return p.off }

// Rate returns the messages per second; 0 means no limit.
func (p *Pace) Rate(now time.Time) float64 {
	quiet := now.Sub(p.cutAt)
	if p.cutAt.IsZero() || quiet >= memory {
		p.cutAt = time.Time{}
		return p.most
	}
	rate := p.base
	if p.estimated() {
		rate = max(rate+float64(p.early.Load()), 1)
	}
	slow := regain * math.Sqrt(max(rate, 1))
	rate *= 1 + cut*min(quiet.Seconds()/slow, 1)
	if fast := (quiet.Seconds() - slow) / double; fast > 0 {
		rate *= math.Exp2(fast * fast)
	}
	return p.within(rate)
}

// estimated reports whether the rate is what the relay had accepted when it first throttled; no rate was configured.
func (p *Pace) estimated() bool { return p.round == 1 && p.most == 0 }

// within returns rate, but at most the configured rate.
func (p *Pace) within(rate float64) float64 {
	if p.most > 0 {
		return min(rate, p.most)
	}
	return rate
}

// Round returns the number of cuts so far. A message has the round in which it begins.
func (p *Pace) Round() int { return p.round }

// Next returns the time before which no message begins.
func (p *Pace) Next() time.Time { return p.next }

// Accepted records that the relay has accepted a message that began in the given round. It is safe for concurrent use with
// itself and all other methods.
func (p *Pace) Accepted(round int, now time.Time) {
	p.recent.add(now)
	if round == 0 {
		p.early.Add(1)
	}
}

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
	return !now.Before(p.next) || p.Rate(now) == 0
}

// Begin records that a message begins.
func (p *Pace) Begin(now time.Time) {
	rate := p.Rate(now)
	if rate == 0 {
		return
	}
	if late := now.Add(-slack); p.next.Before(late) {
		p.next = late
	}
	p.next = p.next.Add(interval(rate))
}

// interval returns the time from one message to the next.
func interval(rate float64) time.Duration { return time.Duration(float64(time.Second) / rate) }

// TooFast is called when the relay has refused a message of the given round because messages come too fast. It reports whether
// it has changed the rate.
func (p *Pace) TooFast(round int, now time.Time) (changed bool) {
	if p.off || round != p.round {
		return false
	}
	rate, accepted := p.Rate(now), float64(p.recent.count(now))
	switch {
	case rate == 0 || rate > 4*(accepted+2):
		rate = max(accepted, 1)
	default:
		left := 1 - min(cut, 1/math.Sqrt(accepted)) // the count varies by its square root
		rate = max(rate*left, min(rate, accepted*left), least)
	}
	if p.cutAt.IsZero() {
		p.first = now
	}
	p.round++
	p.cutAt, p.base, p.next = now, rate, now.Add(interval(rate))
	if p.estimated() {
		p.base = accepted - float64(p.early.Load()) // Rate adds those that are accepted later
	}
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
