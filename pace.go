package smtprelay

import (
	"math"
	"sync/atomic"
	"time"
)

// pace is how many messages a second are begun, where the relay has said that they come too fast or Limits.Rate says so. It is
// guarded by the pool's lock.
//
// A relay that limits the rate says so in a reply, not how high the limit is. The first such reply sets the pace to what the
// relay has accepted in the last second. Two seconds later it rises by a quarter a second until the next one. Each later one slows
// it down by a tenth; two seconds without one, and it rises by one per cent a second. After ten minutes without one there is no pace. Messages that are on their way when the pace is cut belong
// to the round before: their refusals do not cut it again.
type pace struct {
	most      float64   // messages a second, as configured; 0 means that nothing is configured
	off       bool      // the relay's replies are not heeded
	rate      float64   // messages a second; 0 means any number
	next      time.Time // no message is begun before
	round     int       // counts the cuts
	cutAt     time.Time // of the last one
	first     time.Time // of the first one
	risen     time.Time // when rate was raised last
	searching bool      // it was cut once: nobody knows yet how low it is
	said      Reply     // how the relay said so last
	recent    recently  // messages that the relay has accepted
}

const (
	paceLeast  = 0.1 // messages a second, at least
	paceCut    = 0.9
	paceRise   = 1.01                  // in a second
	paceSearch = 1.25                  // the same, until it has been cut for the second time
	paceHold   = 2 * time.Second       // after a cut
	paceSlack  = 20 * time.Millisecond // by which a message that was begun late does not delay those behind it
	paceMemory = 10 * time.Minute
)

// newPace returns the pace that Limits.Rate asks for; 0 is none until the relay speaks, negative none at all.
func newPace(rate float64) pace {
	return pace{most: max(rate, 0), rate: max(rate, 0), off: rate < 0}
}

// ready reports whether a message may be begun now.
func (p *pace) ready(now time.Time) bool {
	p.rise(now)
	return p.rate == 0 || !now.Before(p.next)
}

// begin notes that a message is begun.
func (p *pace) begin(now time.Time) {
	if p.rate == 0 {
		return
	}
	if late := now.Add(-paceSlack); p.next.Before(late) {
		p.next = late
	}
	p.next = p.next.Add(time.Duration(float64(time.Second) / p.rate))
}

// rise raises a pace that was cut, or forgets it.
func (p *pace) rise(now time.Time) {
	if p.searching && now.Sub(p.first) <= time.Second {
		p.rate = p.within(max(p.rate, float64(p.recent.count(now)))) // of those that were under way, some were accepted
	}
	switch since := now.Sub(p.cutAt); {
	case p.cutAt.IsZero() || since < paceHold || now.Sub(p.risen) < time.Second/10:
		return
	case since >= paceMemory:
		p.rate, p.cutAt = p.most, time.Time{}
		return
	}
	rise := paceRise
	if p.searching {
		rise = paceSearch
	}
	p.rate = p.within(p.rate * math.Pow(rise, now.Sub(p.risen).Seconds()))
	p.risen = now
}

// within is rate, or the rate that is configured where that is less.
func (p *pace) within(rate float64) float64 {
	if p.most > 0 {
		return min(rate, p.most)
	}
	return rate
}

// tooFast is told when the relay has refused a message of the given round because messages come too fast. It reports whether
// that has changed the pace.
func (p *pace) tooFast(round int, now time.Time) (cut bool) {
	if p.off || round != p.round {
		return false
	}
	p.round++
	if p.rate == 0 {
		p.rate = max(float64(p.recent.count(now)), 1)
	} else {
		p.rate = max(p.rate*paceCut, paceLeast)
	}
	if p.searching = p.cutAt.IsZero(); p.searching {
		p.first = now
	}
	p.cutAt, p.risen = now, now.Add(paceHold)
	p.next = now.Add(time.Duration(float64(time.Second) / p.rate))
	return true
}

// recently counts what has happened in the last second, in tenths. It is safe for concurrent use.
type recently struct {
	tenths [11]atomic.Uint64 // each the number of its tenth of a second, since 1970, and in the last 24 bits a count
}

const countBits = 24

// add counts one.
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

// last is when one was counted last, to a tenth of a second, or else is the time otherwise.
func (r *recently) last(otherwise time.Time) time.Time {
	for i := range r.tenths {
		otherwise = latest(otherwise, time.UnixMilli(int64(r.tenths[i].Load()>>countBits)*100))
	}
	return otherwise
}

// count is how many there were.
func (r *recently) count(now time.Time) (n int) {
	tenth := uint64(now.UnixMilli() / 100)
	for i := range r.tenths {
		if v := r.tenths[i].Load(); v>>countBits+10 >= tenth && v>>countBits <= tenth {
			n += int(v & (1<<countBits - 1))
		}
	}
	return n
}
