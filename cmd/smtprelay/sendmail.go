package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	netmail "net/mail"
	"os"
	"os/user"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/smtprelay/smtprelay"
)

// The exit statuses of sendmail: sysexits.h.
const (
	exUsage       = 64
	exDataErr     = 65
	exNoInput     = 66
	exNoUser      = 67
	exUnavailable = 69
	exTempFail    = 75
	exNoPerm      = 77
	exConfig      = 78
)

// sendmailEnv is where sendmail finds the relay if the environment does not say.
const sendmailEnv = "/etc/smtprelay.env"

// sendmailLimit bounds a whole run: whoever calls an MTA waits for it.
const sendmailLimit = 5 * time.Minute

type sendmailFlags struct {
	extract, ignoreDots, verbose bool
	from, from2, name            string
	o, b, e                      []string
}

func newSendmail() *cobra.Command {
	var f sendmailFlags
	cmd := &cobra.Command{
		Use:   "sendmail [-t] [-i] [-f SENDER] [-F NAME] [RECIPIENT ...] < MESSAGE",
		Short: "Send one message from stdin, in the place of an MTA",
		Long: `Sendmail sends one message, as programs expect it from an MTA's command of this name. Link the program to
/usr/sbin/sendmail. There is no queue: where the relay does not take the message now, the exit status is 75.

Where the message has no From, Date or Message-ID, they are added. There are no local mailboxes and no aliases: recipients are
whole addresses, and in a crontab MAILTO names one. The options -B, -G, -L, -m, -N, -n, -O, -R, -U, -V and -X are taken, and
mean nothing. The relay is SMTP_URL in the environment, else in ` + sendmailEnv + ` (SMTPRELAY_ENV names another
file).

Exit status, as in sysexits.h: 0 accepted for all, 64 usage, 65 the message is wrong or refused, 66 stdin cannot be read, 67
recipients refused, 69 unknown: the relay may have it (do not send it again unseen), 75 try again later, 77 login refused, 78 no
relay is set.`,
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd, args) },
	}
	flags := cmd.Flags()
	flags.BoolVarP(&f.extract, "extract", "t", false, "recipients are those of To, Cc and Bcc too")
	flags.BoolVarP(&f.ignoreDots, "ignore-dots", "i", false, "a line with a dot alone does not end the message")
	flags.StringVarP(&f.from, "sender", "f", "", "`sender`; \"\" or <> is the null sender")
	flags.StringVarP(&f.from2, "sender-too", "r", "", "the same as -f")
	flags.StringVarP(&f.name, "name", "F", "", "the sender's full `name`, for From")
	flags.BoolVarP(&f.verbose, "verbose", "v", false, "tell what the relay says")
	flags.StringArrayVarP(&f.o, "option", "o", nil, "-oi is -i; others (-oem, -odb) are taken and mean nothing")
	flags.StringArrayVarP(&f.b, "mode", "b", nil, "-bm, to send a message, is the only mode")
	flags.StringArrayVarP(&f.e, "errors", "e", nil, "taken, and means nothing: errors go to stderr")
	// What cron and others give to every MTA. Each is taken, and means nothing.
	for _, o := range []struct{ letter, name string }{
		{"B", "body-type"}, {"L", "label"}, {"N", "dsn"}, {"O", "set-option"}, {"R", "dsn-return"}, {"V", "envelope-id"}, {"X", "log"},
	} {
		flags.StringArrayP(o.name, o.letter, nil, "")
		flags.Lookup(o.name).Hidden = true
	}
	for _, o := range []struct{ letter, name string }{{"G", "gateway"}, {"U", "submission"}, {"m", "me-too"}, {"n", "no-aliases"}} {
		flags.BoolP(o.name, o.letter, false, "")
		flags.Lookup(o.name).Hidden = true
	}
	return cmd
}

func (f *sendmailFlags) run(cmd *cobra.Command, args []string) error {
	for _, mode := range f.b {
		if mode != "m" {
			return fmt.Errorf("-b%s: only -bm is supported; there is no queue and no daemon", mode)
		}
	}
	if !f.extract && len(args) == 0 {
		return errors.New("no recipients: name them, or use -t")
	}
	relay := relayFlags{envFile: cmp.Or(os.Getenv("SMTPRELAY_ENV"), sendmailEnv), none: true}
	s, err := relay.read(false)
	if err != nil {
		return &exit{exConfig, err}
	}
	text, err := f.read(cmd.InOrStdin())
	if err != nil {
		return &exit{exNoInput, err}
	}
	m, err := f.message(cmd, text, args)
	if err != nil {
		return err
	}
	s.cfg.Limits.MaxConns = 1
	client, err := smtprelay.New(s.cfg)
	if err != nil {
		return &exit{exConfig, oneOf(err)}
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), sendmailLimit)
	defer cancel()
	receipt, err := client.Send(ctx, smtprelay.Message{From: m.from, To: m.to, Body: &body{m, func() error { return nil }}, FailFast: true})
	client.Close()
	if f.verbose && err == nil {
		fmt.Fprintln(cmd.OutOrStdout(), receipt)
	}
	if err != nil {
		return &exit{sysexit(err), err}
	}
	return nil
}

// read reads the message; without -i it ends at a line that is a dot.
func (f *sendmailFlags) read(in io.Reader) ([]byte, error) {
	if f.ignoreDots || slices.ContainsFunc(f.o, func(o string) bool { return strings.HasPrefix(o, "i") }) {
		return io.ReadAll(in)
	}
	var text []byte
	for r := bufio.NewReader(in); ; {
		line, err := r.ReadBytes('\n')
		if string(bytes.TrimRight(line, "\r\n")) == "." {
			return text, nil
		}
		text = append(text, line...)
		if errors.Is(err, io.EOF) {
			return text, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// message makes the message and its envelope.
func (f *sendmailFlags) message(cmd *cobra.Command, text []byte, args []string) (*mail, error) {
	env := envelope{}
	if cmd.Flags().Changed("sender") || cmd.Flags().Changed("sender-too") {
		if env.from = cmp.Or(f.from, f.from2); env.from == "" || env.from == "<>" {
			env.from = smtprelay.NullSender
		} else if list, err := smtprelay.ParseAddresses(env.from); err != nil || len(list) != 1 {
			return nil, fmt.Errorf("-f %q is no address", env.from)
		} else {
			env.from = list[0]
		}
	}
	named, err := smtprelay.ParseAddresses(args...)
	if err != nil {
		return nil, &exit{exNoUser, localName(err)}
	}
	m := inMemory("stdin", f.complete(text, env.from))
	if err := m.err(); err != nil {
		return nil, &exit{exDataErr, err}
	}
	if !f.extract {
		env.to = named
	} else {
		m.to = append(m.to, named...) // beside those of the header, as Postfix has it
	}
	if err := m.seal(env); err != nil {
		return nil, &exit{exDataErr, localName(err)}
	}
	return m, nil
}

// localName says of an error about an address what it means to those who are used to an MTA.
func localName(err error) error {
	if errors.Is(err, errNoRecipient) {
		return errors.New("there is no recipient: name them, or give the message To, Cc or Bcc")
	}
	return fmt.Errorf("%w; a local name such as root has no mailbox here: want a whole address, in a crontab by MAILTO", oneOf(err))
}

// complete adds what a message must have and the relay would refuse it for: From, Date and Message-ID.
func (f *sendmailFlags) complete(text []byte, from string) []byte {
	if bytes.HasPrefix(text, []byte("From ")) { // the separator of an mbox
		_, text, _ = bytes.Cut(text, []byte("\n"))
	}
	if first, _, _ := bytes.Cut(text, []byte("\n")); !isField(first) { // text alone, as from echo
		text = append([]byte("\n"), text...)
	}
	header, _, _ := bytes.Cut(append([]byte("\n"), bytes.ReplaceAll(text, []byte("\r\n"), []byte("\n"))...), []byte("\n\n"))
	lower := bytes.ToLower(header)
	has := func(name string) bool { return bytes.Contains(lower, []byte("\n"+name+":")) }
	var added bytes.Buffer
	if from == "" || from == smtprelay.NullSender {
		from = login()
	}
	if !has("from") {
		fmt.Fprintf(&added, "From: %s\n", &netmail.Address{Name: f.name, Address: from})
	}
	if !has("date") {
		fmt.Fprintf(&added, "Date: %s\n", time.Now().Format(time.RFC1123Z))
	}
	if !has("message-id") {
		fmt.Fprintf(&added, "Message-ID: %s\n", newMessageID(from))
	}
	return append(added.Bytes(), text...)
}

// isField reports whether line begins a field of a header.
func isField(line []byte) bool {
	name, _, ok := bytes.Cut(line, []byte(":"))
	return ok && len(name) > 0 && !bytes.ContainsAny(name, " \t")
}

// login is the address of who runs the program.
func login() string {
	host, _ := os.Hostname()
	name := "nobody"
	if u, err := user.Current(); err == nil {
		name = u.Username[strings.LastIndexByte(u.Username, '\\')+1:]
	}
	return name + "@" + cmp.Or(host, "localhost")
}

// newMessageID makes a Message-ID with the domain of an address.
func newMessageID(from string) string {
	_, domain, _ := strings.Cut(from, "@")
	return "<" + rand.Text() + "@" + cmp.Or(domain, "localhost") + ">"
}

// sysexit is the exit status for an error of Send.
func sysexit(err error) int {
	e, ok := errors.AsType[*smtprelay.Error](err)
	switch {
	case !ok, e.Outcome == smtprelay.Unknown:
		return exUnavailable
	case e.Op == smtprelay.OpConfig:
		return exConfig
	case e.Outcome == smtprelay.Accepted:
		return exNoUser
	case e.Op == smtprelay.OpAuth && e.Reply.Code/100 == 5:
		return exNoPerm
	case smtprelay.ShouldRetry(err):
		return exTempFail
	case e.Scope == smtprelay.ScopeRecipient:
		return exNoUser
	}
	return exDataErr
}
