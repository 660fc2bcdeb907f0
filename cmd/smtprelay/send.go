package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/smtprelay/smtprelay"
)

// The exit statuses of send, beside exitUsage. The greatest that applies is taken.
const (
	exitSomeRefused = 1
	exitSomeLeft    = 3
	exitSomeUnknown = 4
)

type sendFlags struct {
	relay                       relayFlags
	from                        string
	to                          []string
	journal                     string
	rate                        float64
	conns                       int
	retryRefused, resendUnknown bool
	dryRun, asJSON, quiet       bool
}

func newSend() *cobra.Command {
	var f sendFlags
	cmd := &cobra.Command{
		Use:   "send [flags] FILE | FOLDER | - ...",
		Short: "Send messages from files, mailboxes and folders",
		Long: `Send sends messages of RFC 5322: a file, an mbox, a maildir, a folder of .eml, or stdin ("-"). The sender is --from, else
Sender or From; the recipients are --to, else To, Cc and Bcc. Bcc is never sent; nothing else is changed.

Ctrl-C takes no further message and finishes what is under way; a second one gives that up.

With --journal the same command once more goes on where it was, killed or not, and sends nothing twice. A message whose end
may have left when the program was killed is unknown: the relay may have it or not. It is listed, and not sent again unless
--resend-unknown says so. Messages that were refused for now, or not reached, are sent again; those refused for good only with
--retry-refused.

Exit status: 0 all accepted, 1 some refused for good, 2 usage or settings, 3 some not sent yet (run it again), 4 some unknown.

` + relayHelp,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New(`nothing to send: name files, mailboxes or folders, or "-" for stdin`)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd, args) },
	}
	f.relay.add(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.from, "from", "", "sender of all messages")
	flags.StringArrayVar(&f.to, "to", nil, "recipient of all messages, in the place of To, Cc and Bcc; may be repeated")
	flags.StringVar(&f.journal, "journal", "", "`file` that remembers what was sent")
	flags.Float64Var(&f.rate, "rate", 0, "messages a second at most; 0 is as many as the relay takes")
	flags.IntVar(&f.conns, "conns", 0, "connections at most; 0 is what the URL says, or 10")
	flags.BoolVar(&f.retryRefused, "retry-refused", false, "send again to those who were refused for good")
	flags.BoolVar(&f.resendUnknown, "resend-unknown", false, "send again what is unknown: some may get it twice")
	flags.BoolVar(&f.dryRun, "dry-run", false, "list what would be sent, and send nothing")
	flags.BoolVar(&f.asJSON, "json", false, "print a line of JSON for each message that was sent")
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "no progress")
	return cmd
}

func (f *sendFlags) run(cmd *cobra.Command, args []string) (err error) {
	if f.from != smtprelay.NullSender {
		if err := oneAddress("--from", &f.from); err != nil {
			return err
		}
	}
	env := envelope{from: f.from}
	if env.to, err = smtprelay.ParseAddresses(f.to...); err != nil {
		return fmt.Errorf("--to: %w", oneOf(err))
	}
	if f.rate < 0 {
		return errors.New("--rate: want messages a second, or 0 for as many as the relay takes")
	}
	if slices.Contains(args, "-") && slices.Index(args, "-") != len(args)-1 {
		return errors.New(`"-" is the last of the sources, and stands once`)
	}
	j, err := openJournal(f.journal)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.close()) }()
	if f.dryRun {
		job := &job{flags: f, journal: j, stdout: cmd.OutOrStdout(), stderr: cmd.ErrOrStderr()}
		for range job.messages(args, cmd.InOrStdin(), env) {
		}
		return job.exit(nil)
	}
	s, err := f.relay.read(!slices.Contains(args, "-"))
	if err != nil {
		return err
	}
	if f.rate != 0 {
		s.cfg.Limits.Rate = f.rate
	}
	if f.conns != 0 {
		s.cfg.Limits.MaxConns = f.conns
	}
	client, err := smtprelay.New(s.cfg)
	if err != nil {
		return oneOf(err)
	}
	defer client.Close()
	job := &job{flags: f, client: client, journal: j, stdout: cmd.OutOrStdout(), stderr: cmd.ErrOrStderr()}

	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	go func() { // until the process or the command ends
		select {
		case <-signals:
		case <-ctx.Done():
			return
		}
		job.stopped.Store(true)
		fmt.Fprintln(job.stderr, "\nStopping: what is under way is finished. Once more gives it up.")
		select {
		case <-signals:
		case <-ctx.Done():
			return
		}
		signal.Stop(signals) // a third one ends the program at once
		cancel()
	}()
	return job.run(ctx, args, cmd.InOrStdin(), env)
}

// A job is one run of send.
type job struct {
	flags          *sendFlags
	client         *smtprelay.Client
	journal        *journal
	stdout, stderr io.Writer
	stopped        atomic.Bool // no further message is taken

	// Of the goroutine that reads the sources, until SendAll has ended.
	before   [4]int   // messages of earlier runs: see count
	unknown  []string // earlier runs left unknown
	mistakes []string // sources that cannot be read

	accepted, partly, refused, left int // messages of this run
	lost                            []string
}

// A task is the Tag of a message.
type task struct {
	mail *mail
	to   []string
}

func (j *job) run(ctx context.Context, args []string, stdin io.Reader, env envelope) error {
	ping, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := j.client.Ping(ping); err != nil { // one clear line instead of one for each message
		return &exit{exitSomeLeft, fmt.Errorf("nothing was sent: %w\n(smtprelay check tells what to change)", err)}
	}
	bar := progressbar.NewOptions(-1, progressbar.OptionSetWriter(j.stderr), progressbar.OptionSetDescription("sending"),
		progressbar.OptionSetVisibility(!j.flags.quiet && j.stderr == os.Stderr && term.IsTerminal(int(os.Stderr.Fd()))),
		progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionSetItsString("mails"), progressbar.OptionThrottle(100*time.Millisecond))
	var journalErr error
	for r := range j.client.SendAll(ctx, j.messages(args, stdin, env)) {
		t := r.Message.Tag.(task)
		if err := j.ended(t, r); err != nil && journalErr == nil {
			journalErr = err
			j.stopped.Store(true)
		}
		_ = bar.Add(1)
	}
	_ = bar.Exit()
	quit, cancelQuit := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancelQuit()
	_ = j.client.Shutdown(quit) // everything has its result already
	return j.exit(journalErr)
}

// messages are those of the sources that are to be sent.
func (j *job) messages(args []string, stdin io.Reader, env envelope) func(func(smtprelay.Message) bool) {
	return func(yield func(smtprelay.Message) bool) {
		for m, err := range mails(args, stdin, env) {
			if j.stopped.Load() {
				return
			}
			if err != nil {
				j.mistakes = append(j.mistakes, err.Error())
				continue
			}
			to := j.due(m)
			if len(to) == 0 {
				continue
			}
			if j.flags.dryRun {
				fmt.Fprintf(j.stdout, "%s: from %s to %s\n", m.source, m.from, strings.Join(to, ", "))
				continue
			}
			t := task{m, to}
			if !yield(smtprelay.Message{From: m.from, To: to, Tag: t,
				Body: &body{m, func() error { return j.journal.intent(m, to) }}}) {
				return
			}
		}
	}
}

// due returns to whom m is still to be sent, and counts what earlier runs have made of it.
func (j *job) due(m *mail) []string {
	fates := j.journal.fates(m)
	if fates == nil {
		return m.to
	}
	var to, unknown []string
	for _, rcpt := range m.to {
		switch is := fates[rcpt]; {
		case is == "", is == fateLeft, is == fateRefused && j.flags.retryRefused, is == fateUnknown && j.flags.resendUnknown:
			to = append(to, rcpt)
		case is == fateUnknown:
			unknown = append(unknown, rcpt)
		}
	}
	switch {
	case len(unknown) > 0:
		j.unknown = append(j.unknown, m.source+": to "+strings.Join(unknown, ", "))
	case len(to) > 0:
	case slices.ContainsFunc(m.to, func(rcpt string) bool { return fates[rcpt] == fateRefused }):
		j.before[exitSomeRefused]++
	default:
		j.before[0]++
	}
	return to
}

// ended notes what became of a message.
func (j *job) ended(t task, r smtprelay.Result) error {
	fates := fatesOf(t.to, r)
	err := j.journal.result(t.mail, fates, r)
	has := func(f fate) bool {
		return slices.ContainsFunc(t.to, func(to string) bool { return fates[to] == f })
	}
	if r.Err != nil {
		fmt.Fprintf(j.stderr, "%s: %s\n", t.mail.source, strings.TrimPrefix(r.Err.Error(), "smtprelay: "))
	}
	switch {
	case has(fateUnknown):
		var to []string
		for _, rcpt := range t.to {
			if fates[rcpt] == fateUnknown {
				to = append(to, rcpt)
			}
		}
		j.lost = append(j.lost, t.mail.source+": to "+strings.Join(to, ", "))
	case has(fateLeft):
		j.left++
	case has(fateRefused) && has(fateAccepted):
		j.partly++
	case has(fateRefused):
		j.refused++
	default:
		j.accepted++
	}
	if j.flags.asJSON {
		line := struct {
			Source  string          `json:"source"`
			From    string          `json:"from"`
			Result  map[string]fate `json:"result"`
			QueueID string          `json:"queue_id,omitempty"`
			Error   string          `json:"error,omitempty"`
		}{t.mail.source, t.mail.from, fates, r.Receipt.QueueID, ""}
		if r.Err != nil {
			line.Error = r.Err.Error()
		}
		out := json.NewEncoder(j.stdout)
		out.SetEscapeHTML(false)
		err = errors.Join(err, out.Encode(line))
	}
	return err
}

// fatesOf is what became of a message for each of its recipients.
func fatesOf(to []string, r smtprelay.Result) map[string]fate {
	again := smtprelay.RetryTo(r.Err)
	fates := make(map[string]fate, len(to))
	for _, rcpt := range r.Receipt.Recipients {
		switch {
		case rcpt.Outcome == smtprelay.Accepted:
			fates[rcpt.To] = fateAccepted
		case rcpt.Outcome == smtprelay.Unknown:
			fates[rcpt.To] = fateUnknown
		case slices.Contains(again, rcpt.To):
			fates[rcpt.To] = fateLeft
		default:
			fates[rcpt.To] = fateRefused
		}
	}
	for _, rcpt := range to { // an error without recipients
		if fates[rcpt] == "" {
			fates[rcpt] = map[bool]fate{true: fateLeft, false: fateRefused}[smtprelay.ShouldRetry(r.Err)]
			if outcome := smtprelay.OutcomeOf(r.Err); outcome != smtprelay.NotAccepted {
				fates[rcpt] = fateUnknown
			}
		}
	}
	return fates
}

// exit prints the summary and returns the exit status.
func (j *job) exit(err error) error {
	for _, m := range j.mistakes {
		fmt.Fprintf(j.stderr, "%s\n", m)
	}
	lost := append(j.unknown, j.lost...)
	code := 0
	switch stopped := j.stopped.Load(); {
	case len(lost) > 0:
		code = exitSomeUnknown
	case j.left > 0 || stopped:
		code = exitSomeLeft
	case j.refused+j.partly+j.before[exitSomeRefused] > 0:
		code = exitSomeRefused
	case len(j.mistakes) > 0:
		code = exitUsage
	}
	out := j.stdout
	if j.flags.asJSON {
		out = j.stderr
	}
	if !j.flags.dryRun {
		var parts []string
		for _, c := range []struct {
			n    int
			what string
		}{
			{j.accepted, "accepted"}, {j.partly, "accepted for some of their recipients"}, {j.refused, "refused"}, {j.left, "not sent yet"},
			{len(lost), "unknown"}, {j.before[0], "accepted in earlier runs"}, {j.before[exitSomeRefused], "refused in earlier runs"},
			{len(j.mistakes), "cannot be read"},
		} {
			if c.n > 0 {
				parts = append(parts, fmt.Sprintf("%d %s", c.n, c.what))
			}
		}
		if len(parts) == 0 {
			parts = []string{"none"}
		}
		fmt.Fprintf(out, "Messages: %s.\n", strings.Join(parts, ", "))
	}
	if len(lost) > 0 {
		fmt.Fprintln(out, "\nUnknown (the relay may have them; --resend-unknown sends them again, and some may arrive twice):")
		for _, l := range lost {
			fmt.Fprintln(out, " ", l)
		}
	}
	if code == exitSomeLeft || j.stopped.Load() {
		if j.flags.journal != "" {
			fmt.Fprintln(out, "Run the same command again: it goes on where it was.")
		} else {
			fmt.Fprintln(out, "Without --journal the same command would send everything again.")
		}
	}
	if err != nil {
		return &exit{max(code, exitSomeLeft), err}
	}
	if code != 0 {
		return &exit{code: code}
	}
	return nil
}
