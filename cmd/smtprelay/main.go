// Smtprelay checks a mail relay, sends mail through it, is a relay to develop against, and looks after an outbox, from the command line.
//
//	export SMTP_URL='smtps://apikey:KEY@smtp.sendgrid.net:465'
//	smtprelay check                                    # why does no mail go out?
//	smtprelay check --from a@example.com --to b@example.org
//	smtprelay send --journal news.journal news/*.eml   # interrupted or killed, it goes on where it was
//	smtprelay sendmail -t < mail.eml                   # in the place of an MTA
//	smtprelay serve --fault 'rcpt=450 4.2.1 later'     # a relay to develop against, with a page
//	smtprelay outbox list --state unknown,dead         # what a service's outbox wants a person to decide
//
// To install it, run "go install ./cmd/smtprelay" in a clone of the repository.
//
// Check tells step by step what works, and of what does not what to change. Send reads messages from files, mailboxes and
// folders; its journal knows what became of each, so that the same command once more sends nothing twice.
//
// # The relay
//
// The relay is one setting, a URL as smtprelay.ParseURL reads it. The first of these counts:
//
//	--relay-file FILE    a file that holds the URL
//	--relay URL          without a password, since other users see the command line of a process
//	SMTP_URL             in the environment
//	SMTP_URL             in the file .env of the current directory (--env-file names another one)
//	a prompt             on a terminal
//
// A password that the URL does not have is taken from --password-file, else from SMTP_PASSWORD, in the environment or in the file
// .env, else a terminal is asked for it.
//
// # Sendmail
//
// Called as "sendmail", by a link of that name or as a subcommand, the program takes the options that MTAs take. It reads
// SMTP_URL from the environment, else from /etc/smtprelay.env (SMTPRELAY_ENV names another one), and never from the current
// directory, which may be somebody else's. It has no queue: where the relay cannot be reached it ends with 75 (EX_TEMPFAIL).
//
// # Serve
//
// Serve takes mail and sends it nowhere. It keeps to the limits that relays have, and goes wrong as relays do, when it is told
// to: by --fault, on its web page, or by its HTTP API, while it runs. The page shows each dialogue as it happens with its round
// trips, what was refused and what has arrived; HTML mail is shown in a frame without scripts, origin and network. The API is
// described in SERVE.md, beside this file.
//
// # Outbox
//
// Outbox lists, shows, counts and decides about the messages in the store of package outbox, while its workers run. The store
// is one setting, --store or SMTPRELAY_OUTBOX in the environment:
//
//	/var/lib/shop/outbox                      the folder of a sqlitestore
//	nats://one:4222,nats://two:4222/NAME      the stream NAME of a natsstore; "outbox" without it
//	tls://one:4222/NAME?ca=FILE&creds=FILE    with TLS and credentials
//
//	smtprelay outbox list --state dead --to @example.org
//	smtprelay outbox show order-17                     # what the relay has said; envelope and header
//	smtprelay outbox resolve order-17 sent             # or resend, or drop: what is unknown or dead
//	smtprelay outbox requeue order-18                  # what is dead
//	smtprelay outbox cancel order-19                   # what is queued
//	smtprelay outbox watch --json                      # counts, once a second; stats counts once
//	smtprelay outbox page                              # the same on a web page, guarded as that of serve
//
// # Exit status
//
//	check     0 all is well   2 usage or settings   3 not reached, or hung up   4 TLS   5 AUTH   6 sender or recipient refused
//	send      0 all accepted  1 some refused        2 usage or settings   3 some not sent yet: run again   4 some unknown
//	sendmail  as in sysexits.h
//	serve     0 ended by Ctrl-C    2 usage or settings   3 an address or a file could not be had
//	outbox    0 done               1 no such message, or not possible in its state   2 usage or settings   3 the store was not reached, or no address for the page
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func main() {
	os.Exit(run(context.Background(), os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// exitUsage is the exit status of wrong usage and wrong settings, but for sendmail.
const exitUsage = 2

// An exit is an error with the exit status that it is to have. Without err all has been said.
type exit struct {
	code int
	err  error
}

func (e *exit) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exit) Unwrap() error { return e.err }

// run is the program with those arguments, the first of which is its name.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	args = append([]string(nil), args...)
	if name := strings.TrimSuffix(filepath.Base(args[0]), ".exe"); name == "sendmail" {
		args = append([]string{args[0], "sendmail"}, args[1:]...)
	}
	cmd := newRoot()
	cmd.SetArgs(args[1:])
	cmd.SetIn(stdin)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	name, code := "smtprelay", exitUsage
	if len(args) > 1 && args[1] == "sendmail" {
		name, code = "sendmail", exUsage
	}
	e, ok := errors.AsType[*exit](err)
	if ok {
		code = e.code
	}
	if !ok || e.err != nil {
		fmt.Fprintf(stderr, "%s: %s\n", name, strings.TrimPrefix(err.Error(), "smtprelay: "))
	}
	return code
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "smtprelay",
		Short:         "Check a mail relay, send mail through it, be one to develop against, or look after an outbox",
		Long:          "Smtprelay checks a mail relay, sends mail through it, is a relay to develop against, and looks after an outbox.\n\n" + relayHelp,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(newCheck(), newSend(), newSendmail(), newServe(), newOutbox(), newMan(root))
	return root
}

// takes is an Args for a command with n arguments.
func takes(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == n:
			return nil
		case n == 0 && cmd.HasSubCommands():
			return fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
		case n == 0:
			return fmt.Errorf("%s takes flags only, and no %q", cmd.Name(), args[0])
		}
		return fmt.Errorf("usage: %s", cmd.UseLine())
	}
}

func newMan(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:   "man FOLDER",
		Short: "Write the manual pages into a folder",
		Args:  takes(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root.DisableAutoGenTag = true
			return doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "smtprelay"}, args[0]) // of this month, or of SOURCE_DATE_EPOCH
		},
	}
}
