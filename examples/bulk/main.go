// Bulk sends one mail to each address of a list, as many at a time as the relay's connections can carry, and shows its progress.
//
//	SMTP_URL='smtps://apikey:KEY@smtp.sendgrid.net:465' go run . -from news@example.com -list addresses.txt -text news.txt
//
// After Ctrl-C, bulk takes no further address, finishes what is in progress, and reports what was sent and what was not, as at
// the end of the list. Ctrl-C again ends the program at once. The exit status is 1 unless every mail was accepted. With -o a line
// is written for each address: the outcome, "again" if sending the mail again is safe and may help, the code of the relay's
// reply, its queue ID, the error. Each mail's Message-ID is the same in every run with the same text, so that you can search the
// relay's log for it. Without SMTP_URL a fake relay 20 ms away accepts the mail, and without -list 5,000 addresses are made up,
// so that you can try it without an account.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/csv"
	"errors"
	"flag"
	"fmt"
	"io"
	"mime"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

func main() {
	var (
		from     = flag.String("from", "news@example.com", "envelope sender and From of the mails")
		listFile = flag.String("list", "", "file with one address on each line; empty lines and lines that begin with # are ignored")
		subject  = flag.String("subject", "News", "subject of the mails")
		textFile = flag.String("text", "", "file with the text of the mails")
		leave    = flag.String("unsubscribe", "https://example.com/unsubscribe", "URL that unsubscribes; ?address= is added for each")
		outFile  = flag.String("o", "", "file for the outcome of each address, as CSV")
	)
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: [SMTP_URL=smtps://user:password@host:465] bulk [flags]\nWithout SMTP_URL a fake relay accepts the mails, and without -list addresses are made up.")
		flag.PrintDefaults()
	}
	flag.Parse()

	// The first Ctrl-C ends ctx; later signals have their usual effect.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)

	if err := run(ctx, os.Getenv("SMTP_URL"), *from, *listFile, *subject, *textFile, *leave, *outFile); err != nil {
		fmt.Fprintln(os.Stderr, "bulk:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, relayURL, from, listFile, subject, textFile, unsubscribe, outFile string) (err error) {
	list, err := readList(listFile)
	if err != nil {
		return err
	}
	text := []byte("There is news.\r\n")
	if textFile != "" {
		if text, err = os.ReadFile(textFile); err != nil {
			return err
		}
	}
	cfg, done, err := relayConfig(relayURL)
	if err != nil {
		return err
	}
	defer done()
	client, err := smtprelay.New(cfg)
	if err != nil {
		return err
	}
	defer client.Close()
	ping, cancel := context.WithTimeout(ctx, 30*time.Second) // else a relay that says nothing would take minutes
	defer cancel()
	if err := client.Ping(ping); err != nil { // one clear line now, not one for each address
		return err
	}

	var out io.Writer = io.Discard
	if outFile != "" {
		f, err2 := os.Create(outFile)
		if err2 != nil {
			return err2
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		out = f
	}
	bar := progressbar.NewOptions(len(list),
		progressbar.OptionSetWriter(os.Stderr),
		progressbar.OptionSetVisibility(term.IsTerminal(int(os.Stderr.Fd()))),
		progressbar.OptionSetDescription("sending"),
		progressbar.OptionShowCount(),
		progressbar.OptionShowIts(),
		progressbar.OptionSetItsString("mails"),
		progressbar.OptionThrottle(100*time.Millisecond),
	)
	job := job{client: client, from: from, subject: subject, text: text, unsubscribe: unsubscribe}
	report, err := job.send(ctx, list, out, func() { _ = bar.Add(1) })
	_ = bar.Exit()
	fmt.Fprintln(os.Stderr)
	report.print(os.Stdout)

	quit, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return errors.Join(err, report.err(), client.Shutdown(quit))
}

func relayConfig(relayURL string) (cfg smtprelay.Config, done func(), err error) {
	if relayURL == "" {
		fmt.Fprintln(os.Stderr, "SMTP_URL is not set: a fake relay accepts the mails, and none leaves this program.")
		relay := smtptest.NewUnstartedServer()
		relay.Delay = 20 * time.Millisecond
		relay.DropBodies = true
		relay.Start()
		return relay.Config(), relay.Close, nil
	}
	cfg, err = smtprelay.ParseURL(relayURL)
	return cfg, func() {}, err
}

// readList returns the addresses of the file, or made-up ones without a file.
func readList(file string) ([]string, error) {
	var list []string
	if file == "" {
		for i := range 5000 {
			list = append(list, fmt.Sprintf("reader%d@example.org", i+1))
		}
		return list, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if line := strings.TrimSpace(lines.Text()); line != "" && !strings.HasPrefix(line, "#") {
			list = append(list, line)
		}
	}
	return list, lines.Err()
}

// job is what all the mails share.
type job struct {
	client        *smtprelay.Client
	from, subject string
	text          []byte
	unsubscribe   string // URL
}

// send mails to each address of list and calls step after each. When ctx ends it takes no further address from list and finishes
// what is in progress: cancelling that would leave mails with an unknown outcome.
func (j job) send(ctx context.Context, list []string, out io.Writer, step func()) (report, error) {
	taken := 0
	messages := func(yield func(smtprelay.Message) bool) {
		for _, to := range list {
			if ctx.Err() != nil {
				return
			}
			taken++
			if !yield(j.message(to)) {
				return
			}
		}
	}

	r := report{addresses: len(list), interrupted: func() bool { return ctx.Err() != nil }}
	w := csv.NewWriter(out)
	for result := range j.client.SendAll(context.WithoutCancel(ctx), messages) {
		r.add(result)
		_ = w.Write(row(result)) // w.Error returns its error
		step()
	}
	// SendAll no longer uses messages, so taken does not change any more.
	for _, to := range list[taken:] {
		r.untried = append(r.untried, to)
		_ = w.Write([]string{to, "not tried", "again", "", "", ""})
	}
	w.Flush()
	return r, w.Error()
}

func (j job) message(to string) smtprelay.Message {
	var b bytes.Buffer
	id := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %q", j.from, to, j.subject, j.text))
	_, domain, _ := strings.Cut(j.from, "@")
	fmt.Fprintf(&b, "From: <%s>\r\nTo: <%s>\r\nSubject: %s\r\n", j.from, to, mime.QEncoding.Encode("utf-8", j.subject))
	fmt.Fprintf(&b, "Date: %s\r\nMessage-ID: <%x@%s>\r\n", time.Now().Format(time.RFC1123Z), id[:16], domain)
	fmt.Fprintf(&b, "List-Unsubscribe: <%s?address=%s>\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n", j.unsubscribe, url.QueryEscape(to)) // RFC 8058
	fmt.Fprintf(&b, "MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n")
	b.Write(j.text)
	return smtprelay.Message{From: j.from, To: []string{to}, Body: smtprelay.Bytes(b.Bytes())}
}

// row is a mail's line in the CSV file: address, outcome, whether to send it again, code, queue ID, error.
func row(r smtprelay.Result) []string {
	to, outcome := r.Message.To[0], smtprelay.OutcomeOf(r.Err).String()
	if r.Err == nil {
		return []string{to, outcome, "", strconv.Itoa(r.Receipt.Reply.Code), r.Receipt.QueueID, ""}
	}
	again, code := "", ""
	if smtprelay.ShouldRetry(r.Err) {
		again = "again"
	}
	if e, ok := errors.AsType[*smtprelay.Error](r.Err); ok && e.Reply.Code != 0 {
		code = strconv.Itoa(e.Reply.Code)
	}
	return []string{to, outcome, again, code, "", r.Err.Error()}
}

// report has the results for the list.
type report struct {
	addresses   int
	accepted    int
	again       []smtprelay.Result // not accepted; sending them again is safe and may help
	refused     []smtprelay.Result // not accepted; do not send them again unchanged
	unknown     []smtprelay.Result
	untried     []string
	interrupted func() bool
}

func (r *report) add(result smtprelay.Result) {
	switch {
	case result.Err == nil:
		r.accepted++
	case smtprelay.ShouldRetry(result.Err):
		r.again = append(r.again, result)
	case smtprelay.OutcomeOf(result.Err) == smtprelay.NotAccepted:
		r.refused = append(r.refused, result)
	default:
		r.unknown = append(r.unknown, result)
	}
}

// err is nil if all mails were accepted.
func (r *report) err() error {
	if r.accepted == r.addresses {
		return nil
	}
	return fmt.Errorf("%d of %d mails were accepted", r.accepted, r.addresses)
}

func (r *report) print(w io.Writer) {
	if r.interrupted() {
		fmt.Fprintln(w, "Interrupted: no further address was taken, and mails in progress were finished.")
	}
	fmt.Fprintf(w, "%7d addresses\n%7d accepted\n%7d not accepted for now\n%7d refused\n%7d unknown\n%7d not tried\n",
		r.addresses, r.accepted, len(r.again), len(r.refused), len(r.unknown), len(r.untried))
	list(w, "Not accepted for now; safe to send again:", r.again, describe)
	list(w, "Refused; sending them again unchanged does not help:", r.refused, describe)
	list(w, "Unknown; the relay may have accepted them:", r.unknown, describe)
	list(w, "Not tried:", r.untried, func(to string) string { return to })
}

func describe(r smtprelay.Result) string { return r.Message.To[0] + ": " + r.Err.Error() }

// list prints the first few of items under a title.
func list[T any](w io.Writer, title string, items []T, text func(T) string) {
	const most = 5
	if len(items) == 0 {
		return
	}
	fmt.Fprintln(w, title)
	for _, item := range items[:min(most, len(items))] {
		fmt.Fprintf(w, "  %s\n", text(item))
	}
	if more := len(items) - most; more > 0 {
		fmt.Fprintf(w, "  and %d more: -o writes them all\n", more)
	}
}
