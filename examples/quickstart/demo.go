package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/smtp"
	"net/textproto"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

const (
	messages        = 1000
	goroutines      = 100
	usualMessages   = 100
	usualGoroutines = 10 // a semaphore of this size, since the relay accepts no more connections
	roundTrip       = 20 * time.Millisecond
	attachmentSize  = 1 << 20
	withAttachment  = 42 // the message that has it
)

// outcome has the results of a run, as the relay counted them.
type outcome struct {
	messages, goroutines        int
	accepted, refused, unknown  int
	opened, mostOpen, mostOnOne int
	arrivedTwice                int
	turns, messageTurns         int
	took                        time.Duration
	firstError                  error
}

func demo(ctx context.Context, out io.Writer) error {
	mails := make([]mail, messages)
	for i := range mails {
		var attachment []byte
		if i == withAttachment {
			attachment = make([]byte, attachmentSize)
		}
		var err error
		mails[i], err = compose("shop@example.com", fmt.Sprintf("customer%d@example.org", i+1), fmt.Sprintf("Your order no. %d", i+1), attachment)
		if err != nil {
			return err
		}
	}

	fmt.Fprintf(out, "A fake relay in this process: STARTTLS, AUTH, 10 connections, 100 messages on each, a round trip of %v.\n", roundTrip)
	fmt.Fprintf(out, "Messages of text and HTML, one of them with 1 MB attached.\n\n")
	ours, err := runRelay(func(relay *smtptest.Server) (outcome, error) { return sendWithClient(ctx, relay, mails) })
	if err != nil {
		return err
	}
	usual, err := runRelay(func(relay *smtptest.Server) (outcome, error) {
		return sendTheUsualWay(ctx, relay, mails[:usualMessages])
	})
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return errors.New("interrupted")
	}
	return printTable(out, ours, usual)
}

// runRelay calls send with a new relay and adds the relay's counts to its outcome.
func runRelay(send func(*smtptest.Server) (outcome, error)) (outcome, error) {
	relay := smtptest.NewUnstartedServer()
	relay.Delay = roundTrip
	relay.Start()
	defer relay.Close()
	o, err := send(relay)
	if err != nil {
		return o, err
	}
	if n := relay.Stats().Accepted; n != o.accepted {
		return o, fmt.Errorf("the relay accepted %d messages, but %d were reported as accepted", n, o.accepted)
	}
	for _, c := range relay.Conns() {
		o.opened++
		o.mostOnOne = max(o.mostOnOne, c.Mails)
	}
	o.mostOpen = relay.Stats().MaxOpen
	o.arrivedTwice = relay.Stats().Duplicates
	o.turns, o.messageTurns = relay.Stats().Turns, relay.Stats().MessageTurns
	return o, nil
}

// sendWithClient sends the mails through one Client that all goroutines share.
func sendWithClient(ctx context.Context, relay *smtptest.Server, mails []mail) (outcome, error) {
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		return outcome{}, err
	}
	defer client.Close()

	o := send(mails, goroutines, func(m mail) error {
		_, err := client.Send(ctx, smtprelay.Message{From: m.from, To: []string{m.to}, Body: smtprelay.Bytes(m.data)})
		return err
	}, func(err error) bool { return smtprelay.OutcomeOf(err) == smtprelay.NotAccepted })
	return o, client.Shutdown(ctx)
}

// sendTheUsualWay calls net/smtp.SendMail for each mail.
func sendTheUsualWay(_ context.Context, relay *smtptest.Server, mails []mail) (outcome, error) {
	// SendMail cannot be given roots to trust, so this whole process trusts the fake relay's certificate and no other. The
	// go:debug line in main.go allows that.
	x509.SetFallbackRoots(relay.Roots())
	auth := smtp.PlainAuth("", relay.Config().Username, relay.Config().Password, "127.0.0.1")
	return send(mails, usualGoroutines, func(m mail) error {
		return smtp.SendMail(relay.Addr(), auth, m.from, []string{m.to}, m.data)
	}, func(err error) bool {
		// The best guess with net/smtp: if there is a reply, it was probably a refusal.
		var reply *textproto.Error
		return errors.As(err, &reply)
	}), nil
}

// send calls one for each mail, from n goroutines, and counts the results.
func send(mails []mail, n int, one func(mail) error, refused func(error) bool) outcome {
	o := outcome{messages: len(mails), goroutines: n}
	queue := make(chan mail)
	errs := make(chan error)
	var senders sync.WaitGroup
	start := time.Now()
	for range n {
		senders.Go(func() {
			for m := range queue {
				errs <- one(m)
			}
		})
	}
	go func() {
		for _, m := range mails {
			queue <- m
		}
		close(queue)
		senders.Wait()
		close(errs)
	}()
	for err := range errs {
		switch {
		case err == nil:
			o.accepted++
			continue
		case refused(err):
			o.refused++
		default:
			o.unknown++
		}
		if o.firstError == nil {
			o.firstError = err
		}
	}
	o.took = time.Since(start)
	return o
}

func printTable(out io.Writer, ours, usual outcome) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', tabwriter.AlignRight)
	row := func(label string, a, b any) { fmt.Fprintf(w, "%-36s\t%v\t%v\t\n", label, a, b) }
	row("", "smtprelay", "net/smtp.SendMail")
	count := func(label string, of func(outcome) int) { row(label, of(ours), of(usual)) }
	count("messages", func(o outcome) int { return o.messages })
	count("goroutines", func(o outcome) int { return o.goroutines })
	count("accepted", func(o outcome) int { return o.accepted })
	count("refused", func(o outcome) int { return o.refused })
	count("unknown", func(o outcome) int { return o.unknown })
	count("arrived twice", func(o outcome) int { return o.arrivedTwice })
	count("connections opened", func(o outcome) int { return o.opened })
	count("most open at once", func(o outcome) int { return o.mostOpen })
	count("most messages on one", func(o outcome) int { return o.mostOnOne })
	per := func(n int, o outcome) string { return fmt.Sprintf("%.2f", float64(n)/float64(o.messages)) }
	row("turns per message", per(ours.messageTurns, ours), per(usual.messageTurns, usual))
	row("turns per message, set-up included", per(ours.turns, ours), per(usual.turns, usual))
	rate := func(o outcome) string { return fmt.Sprintf("%.0f", float64(o.messages)/o.took.Seconds()) }
	row("messages a second", rate(ours), rate(usual))
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "\nA turn is a round trip: the relay had answered everything and waited for more.\n")
	for _, o := range []outcome{ours, usual} {
		if o.firstError != nil {
			fmt.Fprintf(out, "First error: %v\n", o.firstError)
		}
	}
	return nil
}
