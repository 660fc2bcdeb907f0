package main

// Many messages, and limits.

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay"
)

func oneMessage(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	if err := c.Ping(b.ctx); err != nil {
		return fmt.Errorf("Ping: %w", err)
	}
	if err := b.send(c, b.mail()); err != nil {
		return err
	}
	return c.Shutdown(b.ctx)
}

// queueID looks up the receipt's QueueID in the relay's queue.
func queueID(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	s := b.mail()
	if err := b.send(c, s); err != nil {
		return err
	}
	entries, err := b.queued(b.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch {
		case e.header("X-Check") != s.id:
		case e.id == "":
			return notApplicable("its reply to the final dot has none")
		case e.id != s.receipt.QueueID:
			return fmt.Errorf("the receipt's QueueID is %q, the relay's is %q: %d %s", s.receipt.QueueID, e.id, s.receipt.Reply.Code, s.receipt.Reply.Message)
		}
	}
	return nil
}

// manyMessages keeps within the limits that the relay enforces, so the relay must refuse nothing: a client that counts
// differently gets a 421 here.
func manyMessages(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	if err := b.sendAll(c, 20, b.mails(200)); err != nil {
		return err
	}
	return b.nothingRefused()
}

// badSequence matches the reply to a chunk out of order.
var badSequence = regexp.MustCompile(`: DATA: 50[0-3] `)

// nothingRefused reports the relay's refusals, except known ones.
func (b *bench) nothingRefused() error {
	refused := slices.DeleteFunc(b.refused(), func(s string) bool {
		return badSequence.MatchString(s) || // reply to the probe for refused chunks; a refused chunk of a message would fail its Send
			b.noOverlap && strings.Contains(s, ": 503 ") || b.countsLate && strings.Contains(s, "greeting: 421")
	})
	if len(refused) > 0 {
		return fmt.Errorf("within its limits, but the relay refused %d times, first: %s", len(refused), refused[0])
	}
	return nil
}

func sendAll(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	all := b.mails(200)
	byID := make(map[string]*sending)
	for _, s := range all {
		byID[s.id] = s
	}
	var errs []error
	for r := range c.SendAll(b.ctx, func(yield func(smtprelay.Message) bool) {
		for _, s := range all {
			m := s.message()
			m.Body = bodyOf{m.Body, s}
			if !yield(m) {
				return
			}
		}
	}) {
		s := r.Message.Body.(bodyOf).of
		if s.done {
			errs = append(errs, fmt.Errorf("two results for %s", s.id))
		}
		s.done, s.receipt, s.err = true, r.Receipt, r.Err
		if r.Err != nil {
			errs = append(errs, r.Err)
		}
	}
	return first(errs)
}

// overlap sends on one connection with slow replies. Haraka answers 503 to commands that arrive with a final dot; all messages
// must still be queued once.
func overlap(b *bench) error {
	if err := b.throughProxy(10 * time.Millisecond); err != nil {
		return err
	}
	c, err := b.client(conns(1), messages(10))
	if err != nil {
		return err
	}
	if err := b.sendAll(c, 20, b.mails(40)); err != nil {
		return err
	}
	overlapped := c.Stats().Overlapped
	if offered := b.offered("PIPELINING"); offered && overlapped == 0 {
		return errors.New("PIPELINING is offered, but no transaction was overlapped")
	} else if !offered && overlapped > 0 {
		return fmt.Errorf("PIPELINING is not offered, but %d transactions were overlapped", overlapped)
	}
	return nil
}

// quitBehindDot sends one message per connection, with slow replies: QUIT must not wait for the final reply, unless the relay
// does not offer PIPELINING.
func quitBehindDot(b *bench) error {
	if err := b.throughProxy(20 * time.Millisecond); err != nil {
		return err
	}
	c, err := b.client(conns(1), messages(1))
	if err != nil {
		return err
	}
	for range 3 {
		if err := b.send(c, b.mail()); err != nil {
			return err
		}
	}
	if err := c.Shutdown(b.ctx); err != nil {
		return err
	}
	times, always := b.proxy.ranAhead("QUIT")
	if b.noOverlap {
		return nil // the client noticed at the first QUIT, if TCP sent it together with the dot
	}
	switch offered := b.offered("PIPELINING"); {
	case times != 3:
		return fmt.Errorf("QUIT was sent %d times on 3 connections", times)
	case offered && !always:
		return errors.New("QUIT waited for the final reply although PIPELINING is offered")
	case !offered && always:
		return errors.New("QUIT did not wait for the final reply although PIPELINING is not offered")
	}
	return nil
}

// ownLimits counts from outside what the client promises: connections at once and transactions on each.
func ownLimits(b *bench) error {
	if err := b.throughProxy(0); err != nil {
		return err
	}
	c, err := b.client(conns(3), messages(5))
	if err != nil {
		return err
	}
	if err := b.sendAll(c, 20, b.mails(60)); err != nil {
		return err
	}
	n, atOnce, transactions := b.proxy.count()
	if b.noOverlap {
		transactions-- // one got 503 and was repeated on the same connection
	}
	if atOnce > 3 || transactions > 5 {
		return fmt.Errorf("%d connections at once, 3 are allowed; %d transactions on one, 5 are allowed", atOnce, transactions)
	}
	if n < 12 {
		return fmt.Errorf("60 messages, 5 on each connection, used %d connections", n)
	}
	return nil
}

func messagesPerConnection(b *bench) error {
	if b.noMaxMails != "" {
		return notApplicable(b.noMaxMails)
	}
	c, err := b.client(messages(100))
	if err != nil {
		return err
	}
	if err := b.sendAll(c, 10, b.mails(100)); err != nil {
		return err
	}
	if len(b.refused()) == 0 {
		return errors.New("the relay's limit was not reached: nothing was refused")
	}
	return nil
}

func connections(b *bench) error {
	if b.noMaxConns != "" {
		return notApplicable(b.noMaxConns)
	}
	if err := b.throughProxy(5 * time.Millisecond); err != nil {
		return err
	}
	c, err := b.client(conns(10))
	if err != nil {
		return err
	}
	if err := b.sendAll(c, 30, b.mails(150)); err != nil {
		return err
	}
	if len(b.refused()) == 0 {
		return errors.New("the relay's limit was not reached: nothing was refused")
	}
	return nil
}

func tooManyRecipients(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	to := make([]string, limits.MaxRecipients*5/2)
	for i := range to {
		to[i] = fmt.Sprintf("ann%d", i)
	}
	if err := b.send(c, b.mail(to...)); err != nil {
		return err
	}
	return b.send(c, b.mail())
}

func idle(b *bench) error { return b.idle() }

func idleTLS(b *bench) error {
	if b.brokenTLS {
		return notApplicable("its TLS is broken")
	}
	return b.idle(b.startTLS)
}

// idle lets the relay close an idle connection, and sends again.
func (b *bench) idle(change ...func(*smtprelay.Config)) error {
	if b.noIdle != "" {
		return notApplicable(b.noIdle)
	}
	c, err := b.client(append(change, conns(1), func(c *smtprelay.Config) {
		c.Limits.MaxIdleTime, c.Limits.MaxConnAge = -1, -1 // reach the relay's limit, not ours
	})...)
	if err != nil {
		return err
	}
	if err := b.send(c, b.mail()); err != nil {
		return err
	}
	select {
	case <-b.closed:
	case <-time.After(time.Duration(limits.IdleSeconds+5) * time.Second):
		return errors.New("the relay's close of an idle connection was not noticed")
	}
	return b.send(c, b.mail())
}
