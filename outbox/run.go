package outbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay"
)

// poll is how often Run looks for messages that other processes have enqueued, if the store tells nothing of them.
const poll = time.Second

// Run sends the messages that are due, until ctx ends. Then it waits for the relay's replies to what it has sent, for Drain at most, and
// returns nil. It returns an error if the store has a worker already, or cannot be used from the start; if the store fails later, Run
// tries again.
//
// When Run starts, messages that a dead worker was sending become Unknown.
func (o *Outbox) Run(ctx context.Context) error {
	detach, _, err := o.cfg.Store.Attach(ctx)
	if err != nil && ctx.Err() != nil {
		return nil // nothing was begun
	} else if err != nil {
		return err
	}
	o.mu.Lock()
	o.ends, o.gap = false, slow
	o.mu.Unlock()
	due := make(chan Claim)
	var senders sync.WaitGroup
	for range o.cfg.InHand + o.beside() {
		senders.Go(func() {
			for c := range due {
				o.deliver(ctx, c)
			}
		})
	}
	o.claim(ctx, due)
	close(due)
	o.stop()
	ended := make(chan struct{})
	go func() { senders.Wait(); close(ended) }()
	drain := time.NewTimer(o.cfg.Drain)
	defer drain.Stop()
	select {
	case <-ended:
	case <-drain.C:
		o.giveUp()
		<-ended
	}
	return detach()
}

// claim hands over what is due, until ctx ends.
func (o *Outbox) claim(ctx context.Context, due chan<- Claim) {
	forgotten := time.Time{}
	for ctx.Err() == nil {
		if now := time.Now(); now.Sub(forgotten) > time.Minute {
			forgotten = now
			for n, err := 1, error(nil); n > 0 && err == nil; { // else the next time
				n, err = o.cfg.Store.Forget(ctx, now.Add(-o.cfg.Remember))
			}
		}
		claims, next, err := o.cfg.Store.Claim(ctx, time.Now(), o.beside(), o.weight)
		if err != nil || len(claims) == 0 {
			o.rest(ctx, next)
			continue
		}
		for _, c := range claims {
			select {
			case due <- c:
			case <-ctx.Done():
				o.cfg.Store.Release(c.ID)
			}
		}
	}
}

// beside is how many messages beside those in hand wait for their turn, or for the store to take in what became of them. As many are claimed at
// once: nobody who could send waits for the store.
func (o *Outbox) beside() int { return max(o.cfg.InHand/2, 1) }

func (o *Outbox) weight(tenant string) int { return max(o.cfg.Tenants(tenant), 1) }

// rest waits for something new, for the time when the next message is due, or for the next look.
func (o *Outbox) rest(ctx context.Context, next time.Time) {
	wait := poll
	if !next.IsZero() {
		wait = min(wait, max(time.Until(next), time.Millisecond))
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	var others <-chan struct{}
	if n, ok := o.cfg.Store.(Newser); ok {
		others = n.News()
	}
	select {
	case <-o.news:
	case <-others:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// delivery is one Send of a message.
type delivery struct {
	o      *Outbox
	claim  Claim
	cancel context.CancelCauseFunc

	begun chan struct{} // closed when the store has answered about the intent
	err   error         // what it has said, once begun is closed

	// Guarded by o.mu.
	started bool // the intent is being written down, or is
	passed  bool // the end of the message may have left
}

// slow is the longest time between two messages that leave which is counted, and what is taken for it at first.
const slow = 10 * time.Millisecond

// errStopping ends a delivery where Run is to stop.
var errStopping = errors.New("outbox: stopping")

// stop ends the deliveries whose end has not left.
func (o *Outbox) stop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ends = true
	for d := range o.hands {
		if !d.passed {
			d.cancel(errStopping)
		}
	}
}

// giveUp ends all others.
func (o *Outbox) giveUp() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for d := range o.hands {
		d.cancel(errStopping)
	}
}

func (o *Outbox) stopping() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ends
}

// deliver sends a message, once it is its turn, and writes down what became of it.
func (o *Outbox) deliver(ctx context.Context, c Claim) {
	o.turns <- struct{}{} // the stop ends the messages in hand, so nobody waits here for long
	tried := o.send(ctx, &c)
	<-o.turns
	if !tried {
		o.cfg.Store.Release(c.ID)
		return
	}
	o.end(c)
}

// send takes a message in hand. It reports false where nothing has become of it.
func (o *Outbox) send(ctx context.Context, c *Claim) (tried bool) {
	if now := time.Now(); !c.NotAfter.IsZero() && now.After(c.NotAfter) {
		c.State, c.Changed, c.Reason = Dead, now, "its time had passed (NotAfter)"
		return true
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	d := &delivery{o: o, claim: *c, cancel: cancel, begun: make(chan struct{})}
	if !d.enter() {
		return false
	}
	_, err := o.cfg.Route(c.Item).Send(ctx, smtprelay.Message{
		From: c.From, To: c.To, Body: c.Body, AllOrNothing: c.AllOrNothing, MailOptions: c.MailOptions, RcptOptions: c.RcptOptions,
		BeforeEnd: d.beforeEnd,
	})
	if d.leave() {
		<-d.begun // else the intent might be written down after the end
		if errors.Is(d.err, ErrConflict) {
			return false // cancelled meanwhile; without an intent nothing has left
		}
	}
	c.settle(err, time.Now(), o.cfg.retry)
	return true
}

// enter reports false where Run is to stop.
func (d *delivery) enter() bool {
	d.o.mu.Lock()
	defer d.o.mu.Unlock()
	if d.o.ends {
		return false
	}
	d.o.hands[d] = struct{}{}
	if d.o.cfg.Intent == Early {
		d.o.line = append(d.o.line, d)
		d.o.startNextLocked()
	}
	return true
}

// leave keeps the intent from being started, and reports whether it was.
func (d *delivery) leave() (started bool) {
	d.o.mu.Lock()
	defer d.o.mu.Unlock()
	if i := slices.Index(d.o.line, d); i >= 0 {
		d.o.line = slices.Delete(d.o.line, i, i+1)
	}
	delete(d.o.hands, d)
	if d.started && !d.passed {
		d.o.ahead--
	}
	d.o.startNextLocked()
	return d.started
}

// startNextLocked starts the intents of the messages that are sent next: of so few that a worker which dies leaves few Unknown.
func (o *Outbox) startNextLocked() {
	for few := o.fewLocked(); !o.ends && len(o.line) > 0 && o.ahead < few; {
		o.line[0].startLocked()
		o.line = o.line[1:]
	}
}

// fewLocked is how many messages may have an intent and wait for their end to leave. Of four messages in hand one is on a connection: as
// many, or twice as many as leave while the store writes one intent; half of those in hand at most.
func (o *Outbox) fewLocked() int {
	return max(min(max(o.cfg.InHand/4, int(2*o.begins/o.gap)), o.cfg.InHand/2), 1)
}

// smooth takes is into was, an average of those before.
func smooth(was, is time.Duration) time.Duration { return was + (is-was)/32 }

// startLocked has the intent written down, once.
func (d *delivery) startLocked() {
	if d.started {
		return
	}
	d.started = true
	d.o.ahead++
	go func() { // ends with the store's answer, for which deliver waits
		defer close(d.begun)
		began := time.Now()
		d.err = d.o.cfg.Store.Begin(context.Background(), []Intent{{ID: d.claim.ID, Nonce: d.claim.Nonce}})[0]
		d.o.mu.Lock()
		defer d.o.mu.Unlock()
		d.o.begins = smooth(d.o.begins, time.Since(began))
	}()
}

// beforeEnd lets the end of the message leave once its intent is durable.
func (d *delivery) beforeEnd(ctx context.Context, _ []string) error {
	d.o.mu.Lock()
	d.startLocked()
	d.o.mu.Unlock()
	select {
	case <-d.begun:
	case <-ctx.Done():
		return ctx.Err()
	}
	if d.err != nil {
		return d.err
	}
	d.o.mu.Lock()
	defer d.o.mu.Unlock()
	if d.o.ends && !d.passed {
		return errStopping
	}
	if !d.passed {
		d.passed = true
		now := time.Now()
		d.o.gap, d.o.left = smooth(d.o.gap, min(now.Sub(d.o.left), slow)), now
		d.o.ahead--
		d.o.startNextLocked()
	}
	return nil
}

// storePause is how long a message waits that could not be sent for a reason of ours.
const storePause = time.Second

// storePatience is how long the store is asked to take what became of a message, at least, once Run is to stop. It is a time and no number: a
// store may take a minute to say that it is busy.
const storePatience = 5 * time.Second

// settle takes in what a Send has returned.
func (c *Claim) settle(err error, now time.Time, schedule func(Item) Retry) {
	c.Changed = now
	var results []smtprelay.RecipientResult
	e, ok := errors.AsType[*smtprelay.Error](err)
	if ok {
		results = e.Recipients
	}
	for _, to := range c.To {
		fate := Fate{To: to, Outcome: smtprelay.OutcomeOf(err)}
		if i := slices.IndexFunc(results, func(r smtprelay.RecipientResult) bool { return r.To == to }); i >= 0 {
			r := results[i]
			fate.Outcome, fate.Code, fate.QueueID = r.Outcome, r.Reply.Code, r.QueueID
			if r.Reply.Code != 0 {
				fate.Reply = r.Reply.String()
			}
		}
		if i := slices.IndexFunc(c.Fates, func(f Fate) bool { return f.To == to }); i >= 0 {
			c.Fates[i] = fate
		} else {
			c.Fates = append(c.Fates, fate)
		}
	}
	if err != nil {
		c.Reason = err.Error()
	}
	again := smtprelay.RetryTo(err)
	if len(again) == 0 && smtprelay.ShouldRetry(err) {
		again = c.To
	}
	outcome := smtprelay.OutcomeOf(err)
	switch ours := ok && e.Scope == smtprelay.ScopeCaller; {
	case outcome == smtprelay.Unknown:
		c.State, c.To = Unknown, c.missing()
		c.Attempts++
	case len(again) > 0 && ours:
		c.State, c.To, c.Due = Queued, again, now.Add(storePause)
	case len(again) > 0:
		c.Attempts++
		c.To = again
		retry := schedule(c.Item)
		c.Due = now.Add(retry.wait(c.Attempts))
		first := c.Created
		if c.NotBefore.After(first) {
			first = c.NotBefore
		}
		c.State = Queued
		if c.Due.Sub(first) > retry.For || !c.NotAfter.IsZero() && c.Due.After(c.NotAfter) {
			c.State, c.To = Dead, c.missing()
			c.Reason = fmt.Sprintf("given up after %d attempts: %s", c.Attempts, c.Reason)
		}
	default:
		c.Attempts++
		c.State, c.To = Accepted, c.missing()
		if len(c.To) > 0 {
			c.State = Dead
		}
	}
}

// missing returns those who have not certainly got the message.
func (i *Item) missing() (to []string) {
	for _, f := range i.Fates {
		if f.Outcome != smtprelay.Accepted {
			to = append(to, f.To)
		}
	}
	return to
}

// wait is how long to wait after so many attempts.
func (r Retry) wait(attempts int) time.Duration {
	wait := r.Most
	if shift := attempts - 1; shift < 32 && r.First < r.Most>>shift {
		wait = r.First << shift
	}
	return wait - rand.N(wait/4+1)
}

// end writes down what became of c. A store that does not take it is asked again: until it does, the message is Sending. Where
// Run is to stop, it is left so after a while, and is Unknown from the next Run on.
func (o *Outbox) end(c Claim) {
	for wait, began := 10*time.Millisecond, time.Now(); ; wait = min(2*wait, storePause) {
		err := o.cfg.Store.End(context.Background(), []End{{Nonce: c.Nonce, Item: c.Item}})[0]
		if err == nil {
			break
		}
		if errors.Is(err, ErrConflict) || o.stopping() && time.Since(began) > storePatience {
			o.cfg.Store.Release(c.ID)
			return
		}
		time.Sleep(wait)
	}
	o.count(c.State)
	if o.cfg.Ended != nil {
		o.cfg.Ended(c.Item)
	}
}
