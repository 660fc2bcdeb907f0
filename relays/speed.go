package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/smtp"
	"slices"
	"time"

	"github.com/smtprelay/smtprelay"
)

// Compares the time per message of a single sender with net/smtp's Client on a kept connection, the minimum that a client can do.
// Both replace their connection after equally many messages, and alternate, so that the machine's load is the same for both.

const (
	speedRounds   = 12
	speedMessages = 60      // in a round
	speedSize     = 5 << 10 // octets
	speedMost     = 1.5     // times net/smtp's
)

// speed measures one relay in one mode. It fails if the client takes longer than speedMost times net/smtp.
func speed(r *running, mode string) (string, error) {
	cfg := smtprelay.Config{
		Addr: address(r.Plain), TLS: smtprelay.TLSNone, LocalName: "client.example", Chunking: mode == inChunks,
		Limits: smtprelay.Limits{MaxConns: 1, MaxMessagesPerConn: limits.MaxMessages},
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		return "", err
	}
	defer client.Close()
	var text bytes.Buffer
	text.WriteString("From: shop@client.example\r\nTo: ann@relay.example\r\nSubject: measured\r\n\r\n")
	for text.Len() < speedSize {
		text.WriteString("The quick brown fox jumps over the lazy dog, and then it does so once again.\r\n")
	}
	ours := func() error {
		_, err := client.Send(context.Background(), smtprelay.Message{From: "shop@client.example", To: []string{"ann@relay.example"}, Body: smtprelay.Bytes(text.Bytes())})
		return err
	}
	kept := &keptNetSMTP{addr: cfg.Addr}
	defer kept.close()
	theirs := func() error { return kept.send(text.Bytes()) }

	var times [2][]time.Duration
	for range speedRounds {
		for i, send := range []func() error{ours, theirs} {
			for range speedMessages {
				began := time.Now()
				if err := send(); err != nil {
					return "", err
				}
				times[i] = append(times[i], time.Since(began))
			}
		}
	}
	// The mean without the slowest twentieth, which is the machine's noise: more messages than that open a connection.
	var means [2]time.Duration
	for i, all := range times {
		slices.Sort(all)
		all = all[:len(all)*19/20]
		for _, d := range all {
			means[i] += d / time.Duration(len(all))
		}
	}
	ratio := float64(means[0]) / float64(means[1])
	line := fmt.Sprintf("%v a message, net/smtp %v: %.2f times", means[0].Round(time.Microsecond), means[1].Round(time.Microsecond), ratio)
	if ratio > speedMost {
		return line, fmt.Errorf("more than %v times net/smtp", speedMost)
	}
	return line, nil
}

// keptNetSMTP is net/smtp's Client on a connection that is kept for as many messages as the relay allows.
type keptNetSMTP struct {
	addr string
	c    *smtp.Client
	sent int
}

func (k *keptNetSMTP) send(text []byte) error {
	if k.sent == limits.MaxMessages {
		k.close()
	}
	if k.c == nil {
		c, err := smtp.Dial(k.addr)
		if err != nil {
			return err
		}
		k.c, k.sent = c, 0
		if err := c.Hello("client.example"); err != nil {
			return err
		}
	}
	k.sent++
	if err := errors.Join(k.c.Mail("shop@client.example"), k.c.Rcpt("ann@relay.example")); err != nil {
		return err
	}
	w, err := k.c.Data()
	if err != nil {
		return err
	}
	_, err = w.Write(text)
	return errors.Join(err, w.Close())
}

func (k *keptNetSMTP) close() {
	if k.c != nil {
		k.c.Quit()
		k.c = nil
	}
}

// speeds measures one relay in each mode that it supports.
func speeds(r *running, name string) []verdict {
	var verdicts []verdict
	for _, mode := range []string{byData, inChunks} {
		if mode == inChunks && !r.habit.offers {
			break
		}
		v := verdict{relay: name, check: "speed", mode: mode, state: "ok"}
		line, err := speed(r, mode)
		if err != nil {
			v.state, v.reason = "FAIL", err.Error()
		}
		fmt.Printf("  %-4s %-6s  %s %s\n", v.state, mode, line, v.reason)
		verdicts = append(verdicts, v)
	}
	return verdicts
}
