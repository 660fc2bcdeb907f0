package main

// Connections, relays, bodies and clients that break.

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay"
)

// cutBehindDot loses the connection right after the end of a message: its fate is unknown, and it must not be sent again.
func cutBehindDot(b *bench) error {
	if err := b.throughProxy(0); err != nil {
		return err
	}
	for _, reset := range []bool{false, true} {
		c, err := b.client()
		if err != nil {
			return err
		}
		s := b.mail()
		b.proxy.arm(cut{marker: s.lastLine(), behind: true, reset: reset})
		err = b.send(c, s)
		if err := expect(err, smtprelay.Unknown, 0); err != nil {
			return err
		}
		if smtprelay.ShouldRetry(err) {
			return errors.New("ShouldRetry is true for a message whose fate is unknown")
		}
		if err := b.send(c, b.mail()); err != nil {
			return err
		}
	}
	return nil
}

// cutBeforeDot loses the connection inside the last line: not accepted and, with another try, accepted once.
func cutBeforeDot(b *bench) error {
	if err := b.throughProxy(0); err != nil {
		return err
	}
	for _, reset := range []bool{false, true} {
		for _, size := range []int{100, limits.MaxSize / 2} {
			c, err := b.client(attempts(1))
			if err != nil {
				return err
			}
			s := b.mail()
			s.setBody(lines(s.id, size))
			b.proxy.arm(cut{marker: s.lastLine(), reset: reset})
			if err := b.cutShort(b.send(c, s)); err != nil {
				return err
			}
			if c, err = b.client(); err != nil {
				return err
			}
			s = b.mail()
			s.setBody(lines(s.id, size))
			b.proxy.arm(cut{marker: s.lastLine(), reset: reset})
			err = b.send(c, s)
			if err != nil {
				if err := b.cutShort(err); err != nil {
					return err
				}
			}
			if err := b.send(c, b.mail()); err != nil {
				return err
			}
		}
	}
	return nil
}

// cutShort checks what the client may report about a message that the network has cut inside the last line. The client had
// written the whole message: for a small one it cannot know where the cut was.
func (b *bench) cutShort(err error) error {
	if expect(err, smtprelay.NotAccepted, 0) == nil {
		return nil
	}
	return expect(err, smtprelay.Unknown, 0)
}

// killedInBody kills the relay's process, or the whole relay, in the middle of a body, and continues the body once the client has
// seen the connection end.
func killedInBody(b *bench) error {
	kill := func() error {
		ended := b.dialogue.ended()
		if b.session == nil {
			if err := b.restart(); err != nil {
				return err
			}
		} else if n, err := b.killSessions(); err != nil || n == 0 {
			return fmt.Errorf("%d sessions of the relay were killed: %w", n, err)
		}
		return waitFor(10*time.Second, "the end of the connection", func() bool { return b.dialogue.ended() > ended })
	}
	for _, tries := range []int{1, 4} {
		c, err := b.client(attempts(tries))
		if err != nil {
			return err
		}
		s := b.mail()
		text := lines(s.id, limits.MaxSize*3/4)
		s.setBody(text)
		var once sync.Once
		s.body = &slowBody{text: s.header() + text, between: func() (err error) {
			once.Do(func() { err = kill() })
			return err
		}}
		err = b.send(c, s)
		if tries == 1 {
			err = expect(err, smtprelay.NotAccepted, 0)
		}
		if err != nil {
			return err
		}
		if err := b.send(c, b.mail()); err != nil {
			return err
		}
		if err := c.Close(); err != nil { // the next kill must end only its own connection
			return err
		}
	}
	return nil
}

func bodyFails(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	for _, size := range []int{100, limits.MaxSize / 2} {
		s := b.mail()
		s.setBody(lines(s.id, size))
		sorry := errors.New("the disk is gone")
		s.body = &slowBody{text: s.header() + lines(s.id, size), between: func() error { return sorry }}
		err := b.send(c, s)
		if err := expect(err, smtprelay.NotAccepted, 0); err != nil {
			return err
		}
		if !errors.Is(err, sorry) {
			return fmt.Errorf("the body's own error is not in %w", err)
		}
		if err := b.send(c, b.mail()); err != nil {
			return err
		}
	}
	return nil
}

func cancelledInBody(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	for _, size := range []int{100, limits.MaxSize / 2} {
		s := b.mail()
		s.setBody(lines(s.id, size))
		ctx, cancel := context.WithCancel(b.ctx)
		defer cancel()
		s.body = &slowBody{text: s.header() + lines(s.id, size), between: func() error { cancel(); return nil }}
		err := b.sendCtx(ctx, c, s)
		if err := expect(err, smtprelay.NotAccepted, 0); err != nil {
			return err
		}
		if !errors.Is(err, context.Canceled) {
			return fmt.Errorf("context.Canceled is not in %w", err)
		}
		if err := b.send(c, b.mail()); err != nil {
			return err
		}
	}
	return nil
}

// shutdown shuts down the client while many messages wait: each is accepted, or fails with ErrClosed.
func shutdown(b *bench) error {
	c, err := b.client(conns(2))
	if err != nil {
		return err
	}
	all := b.mails(60)
	if err := b.send(c, all[0]); err != nil {
		return err
	}
	var wg sync.WaitGroup
	for _, s := range all[1:] {
		wg.Go(func() { b.send(c, s) })
	}
	if err := waitFor(10*time.Second, "a second message accepted", func() bool { return c.Stats().Accepted > 1 }); err != nil {
		return err
	}
	err = c.Shutdown(b.ctx)
	wg.Wait()
	if err != nil {
		return fmt.Errorf("Shutdown: %w", err)
	}
	for _, s := range all {
		if s.err != nil && (!errors.Is(s.err, smtprelay.ErrClosed) || smtprelay.OutcomeOf(s.err) != smtprelay.NotAccepted) {
			return fmt.Errorf("%s: %w", s.id, s.err)
		}
	}
	return nil
}

// restarted kills the relay while it gets many messages and starts it again. Messages with an outstanding final reply are
// unknown; none of the others is lost or duplicated.
func restarted(b *bench) error {
	c, err := b.client(attempts(-1))
	if err != nil {
		return err
	}
	all := b.mails(150)
	var wg sync.WaitGroup
	work := make(chan *sending)
	for range 10 {
		wg.Go(func() { // ends when work is closed
			for s := range work {
				b.send(c, s)
			}
		})
	}
	var restartErr error
	for i, s := range all {
		if i == 50 {
			restartErr = b.restart()
		}
		work <- s
	}
	close(work)
	wg.Wait()
	if restartErr != nil {
		return fmt.Errorf("restart: %w", restartErr)
	}
	unknown := 0
	for _, s := range all {
		switch s.outcome() {
		case smtprelay.Unknown:
			unknown++
		case smtprelay.NotAccepted:
			return fmt.Errorf("%s: %w", s.id, s.err)
		}
	}
	if most := limits.MaxConns * 8; unknown > most {
		return fmt.Errorf("the fate of %d messages is unknown; with %d connections it can be %d", unknown, limits.MaxConns, most)
	}
	return nil
}
