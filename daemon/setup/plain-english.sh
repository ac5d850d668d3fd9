#!/bin/sh
# Checks that the prose in the project is plain English: comments, messages and documents. Run it in the work tree.
#
#   plain-english.sh
#
# It searches the files that git tracks for words and constructions that make text hard to read, and prints each place
# with a plain replacement. It also reports Markdown tables that have a column without a heading. It exits with 1 if it
# finds anything.
#
# The list contains archaic words, idioms that many readers do not know, phrases that hide who does what, long forms of
# short words, and British spelling. Each rule is a Perl-compatible regular expression, which ignores case, and its
# replacement. Add a rule only if the words have no other common meaning, and add an example to the test in
# daemon/plain_english_test.go.
#
# To quote the text of others, such as a message of another program, add a comment with the marker
# "plain-english: quoted" at the end of the line. The script ignores what precedes the marker.
set -eu

cd -- "$(git rev-parse --show-toplevel)"
# The files to check, without generated code and without this list and its test.
set -- '*.md' '*.go' '*.py' '*.ts' '*.js' '*.mjs' '*.sh' '*.proto' '*.service' '*.socket' Makefile .ci/run \
	':!*.pb.go' ':!daemon/setup/plain-english.sh' ':!daemon/plain_english_test.go'

found=$(mktemp)
trap 'rm -f -- "$found"' EXIT

while IFS= read -r rule; do
	case $rule in
	'' | '#'*) continue ;;
	esac
	status=0
	places=$(git grep -nPiIo -e "(?:${rule%% => *})(?!.*plain-english: quoted)" -- "$@") || status=$?
	if [ "$status" -gt 1 ]; then
		echo "plain-english.sh: git grep failed for the rule $rule" >&2
		exit 2
	fi
	if [ -n "$places" ]; then
		echo "$places" | while IFS= read -r place; do echo "$place: write ${rule#* => }"; done >>"$found"
	fi
done <<'RULES'
# Archaic words and forms.
\banew\b => again, new
\bwhence\b => from where, from which
\bwhere(?:of|in|by|upon|from)\b => of which, in which, by which
\bthere(?:of|in|to|upon|from)\b => of it, in it, to it
\bhere(?:of|in|by|with)\b => of this, in this, with this
\b(?:hitherto|heretofore)\b => until now, before
\bhenceforth\b => from now on
\bforthwith\b => immediately
\blest\b => so that … not
\bwhilst\b => while
\bamongst\b => among
\b(?:nought|aught)\b => nothing, zero
\bfor ever\b => forever
\bamiss\b => wrong, the problem
\bmend(?:s|ed|ing)?\b => fix
\bwhom\b => a sentence with the person as its subject
\bwho(?:so)?ever\b => anyone who, the caller
\bof his own\b => of their own
# Idioms and vague phrases.
\blook(?:s|ed|ing)? after\b => manage
\b(?:is|are|was|were) good for\b => is valid in, is suitable for
\b(?:is|are|be) good again\b => is valid again
\b(?:go|goes|went) on as\b => continue as
\bgoes on (?:with|without|by|in|until|for|running)\b => continues
\bgo on (?:with|without|by|until|running)\b => continue
(?<!that )(?<!what )(?<!which )\b(?:sandbox(?:es)?|servers?|tasks?|shims?) runs? on(?= and| without|[,;:]|$) => keeps running
\b(?:can|cannot|could) be had\b => is available
\bit cannot be told|\bcannot be told\b(?! (?:apart|from)) => cannot be determined
\b(?:is|are|was|were|(?<!cannot )be|been|being) told\b(?! (?:apart|from)) => is reported to, gets the error
\ba key got out|\bkeys? gets? out\b => a key leaks
\b(?:go(?:es)? )?over the environment\b|\bgo(?:es)? over the (?:file|flags?)\b => overrides
\bsays of |\bsay of (?:an?|the|it|its|each|itself)\b => reports, describes
\bsay(?:s|ing)? whether\b => reports whether
\bof a kind of\b => like, a type of
\bkeeps? nobody\b => does not prevent
\b(?:by|to|of|for) nobody\b => not, by no user
\bnobody else\b => only, no other user
\b(?:is|are) believed\b => is trusted
\b(?:see|sees|saw) to (?:it|its|that)\b => check, make sure
\b(?:comes?|came) of it\b => results from it
\btak(?:es?|ing) no offence\b => ignores
\bvouch(?:es|ed)? for\b => records, guarantees
\bturn(?:s|ed)? away\b => refuse
\bhiccups?\b => temporary failure
\bworthless\b => invalid
\bunforeseen\b => unexpected
# "whole" for complete or intact. "the whole file" and "as a whole" are fine.
not whole|\b(?:is|are|was|were|be|been|it|them|stays?|came|come|arrives?) whole\b => complete, intact
\bwholly\b => completely
# API keys.
\b(?:make|makes|made|making) (?:an?|another|further|new)(?: new)?(?: API)? keys?\b(?! (?:live|valid|invalid|public)) => create a key
\bkeys? (?:that (?:was|were) )?made (?:before|so far|from)\b => existing keys
\b(?:an|its|their|no) end of (?:its|their) own\b => an expiry
# "too" at the end of a clause.
, too(?=$|[.;:)"'`]|, (?:and|but|or|so|since|as|for|which|that|unless|if|when)\b) => also, before the verb
# Errors begin with the verb.
(?:Errorf|errors\.New)\("failed to\b => the verb, without "failed to"
# Long forms of short words.
\bin order to\b => to
\butili[sz](?:e|es|ed|ing)\b => use
\bprior to\b => before
\bsubsequent to\b => after
\bin spite of\b => despite
\bdue to the fact that\b => because
\bin the event (?:of|that)\b => if
\bwith regards? to\b => about
\baforementioned\b => this
\bcommenc(?:e|es|ed|ing)\b => start
\bendeavou?r(?:s|ed|ing)?\b => try
# British spelling.
(?<!notifications/)(?<!\.)cancell(?:ed|ing)(?!Error|\(\)|_) => canceled, canceling
(?:col|hon|fav|behavi|neighb)our => color, honor, favor, behavior, neighbor
\bfulfils?\b => fulfill
\b(?:author|initial|normal|optim|organ|random|recogn|serial|summar|synchron)is(?:e[ds]?|ing|ation)\b => -ize
RULES

git grep -Il '' -- '*.md' | while IFS= read -r file; do
	awk -v file="$file" '
		function check_row() {
			if (!heading && previous ~ /^\|[A-Za-z`* \t]*\|([ \t]*\|)+[ \t]*$/)
				print file ":" NR - 1 ":table row with only one cell: fill the other cells"
		}
		# The line below the headings consists of dashes, colons and bars.
		/^[ \t]*\|[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|[ \t]*$/ {
			heading = 1
			if (previous ~ /\|[ \t]*\|/) print file ":" NR - 1 ":table column without a heading: write a heading"
		}
		{ check_row(); previous = $0; heading = 0 }
		END { NR++; check_row() }' "$file"
done >>"$found"

LC_ALL=C sort -t : -k 1,1 -k 2,2n -- "$found"
if [ -s "$found" ]; then
	echo "plain-english.sh: found $(wc -l <"$found") places to rewrite" >&2
	exit 1
fi
